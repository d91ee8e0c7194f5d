"""What stages are compared on, and what a stage said there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np

TOP = 64
"""Most likely tokens kept at each position."""


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One prompt and how the source model continues it, greedily, end-of-text ignored."""

    name: str
    kind: str
    short: bool = False
    text: str
    """What the tokenizer was given (a chat: after its template)."""
    tokens: tuple[int, ...]
    greedy: tuple[int, ...]
    greedy_text: str
    """For the reader; nothing is computed from it."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens a stage is fed: all whose next token is known."""
        return (self.tokens + self.greedy)[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """The token that follows each of `inputs`."""
        return (self.tokens + self.greedy)[1:]

    def within(self, context: int) -> Case:
        """The same case cut to the `context` first inputs."""
        both = (self.tokens + self.greedy)[: context + 1]
        cut = len(self.tokens)
        return msgspec.structs.replace(self, tokens=both[:cut], greedy=both[cut:])


@dataclass(frozen=True, eq=False)
class Observation:
    """What a stage said at the N positions of some cases, teacher-forced, one case after another."""

    top_ids: np.ndarray
    """int32 [N, K], K = min(64, vocab): most likely first, ties by id; -1 where a row is not finite."""
    top_logits: np.ndarray
    """fp32 [N, K]."""
    logsumexp: np.ndarray
    """fp64 [N], over the whole vocabulary; fp64 so that the mass outside the top is not rounding noise."""
    next_logprob: np.ndarray
    """fp64 [N]: log-probability of the token that does follow."""
    at: dict[str, np.ndarray] = field(default_factory=dict)
    """fp32 [N, K] by reference name: this stage's logits at that reference's `top_ids`."""
