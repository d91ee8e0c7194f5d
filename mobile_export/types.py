"""What the stages hand to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, as a transformers folder: config.json, model*.safetensors, tokenizer.json."""

    name: str
    """Folder-safe lower-case name, e.g. `qwen2.5-coder-0.5b-instruct`."""
    spec: str
    """What the user typed to get it (`--model`), for the manifest; never an absolute path."""
    folder: Path
    family: str
    """`qwen2`, `qwen3` or `llama` (config.json's model_type)."""
    digest: str
    """sha256 over config, tokenizer and weights: two checkpoints with one digest are one model."""
    license: str
    """SPDX id, or `unknown`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the bytes came from: kind, packages or repository, revision, sha256 of the original."""

    def model(self) -> PreTrainedModel:
        """The fp32 model in eval mode, tied weights tied. Never pickle, never remote code."""
        from mobile_export.checkpoint.load import load_model

        return load_model(self)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template."""
        from mobile_export.checkpoint.load import load_tokenizer

        return load_tokenizer(self)


@dataclass(frozen=True)
class Dims:
    """The sizes a target needs to know."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    """Positions in each KV cache."""


@dataclass(frozen=True)
class Program:
    """The target-neutral program: `(tokens, start, k_0, v_0, ...) -> (logits, k_0, v_0, ...)`.

    tokens int64 [1, S], S dynamic in [1, context]; start int64 [1]; each cache fp32
    [1, kv_heads, context, head_dim]; logits fp32 [1, S, vocab].
    """

    exported: ExportedProgram
    dims: Dims
    passes: tuple[str, ...] = ()
    """Names of the passes that made it, in order."""
    source: Checkpoint | None = None
    """What it was made of, for passes that need its tokenizer; the runner sets it, nothing stores it."""


def sample_inputs(dims: Dims) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the program's signature and its dynamic shapes, for `torch.export.export`."""
    import torch

    sample = min(8, dims.context)
    length = torch.export.Dim("length", min=1, max=dims.context) if sample > 1 else None
    caches = tuple(torch.zeros(1, dims.kv_heads, dims.context, dims.head_dim) for _ in range(2 * dims.layers))
    inputs = (torch.zeros(1, sample, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), caches)
    return inputs, {"tokens": {1: length}, "start": None, "caches": tuple(None for _ in caches)}


class Runner(Protocol):
    """Something that executes a model: a program, or an artefact in its real runtime."""

    @property
    def vocab(self) -> int: ...

    @property
    def context(self) -> int: ...

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]: logits at every position of `tokens`, which continue the cache at `start`."""
        ...

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]: logits at the last position, by the path a device takes."""
        ...

    def reset(self) -> None:
        """Forget the cache."""
        ...
