"""Reference: the program run eagerly by torch. Our device without a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mobile_export.types import Program, sample_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class ProgramRunner:
    """Runs a program's dialect ops by their eager definitions; the cache is the caller's tensors."""

    def __init__(self, program: Program) -> None:
        from mobile_export import dialect

        assert dialect.rotary is not None  # importing it registered the operators
        self.program = program
        self.module = program.exported.module(check_guards=False)
        self.vocab, self.context = program.dims.vocab, program.dims.context
        self.caches: list[Tensor] = []
        self.reset()

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]."""
        import torch

        with torch.no_grad():
            logits, *self.caches = self.module(
                torch.tensor([list(tokens)]), torch.tensor([start]), tuple(self.caches)
            )
        return logits[0].numpy()

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]."""
        return self.logits(tokens, start)[-1]

    def reset(self) -> None:
        """Empty caches."""
        self.caches = list(sample_inputs(self.program.dims)[0][2])


def open(program: Program) -> ProgramRunner:  # noqa: A001
    """A runner over a program, traced or quantized."""
    return ProgramRunner(program)
