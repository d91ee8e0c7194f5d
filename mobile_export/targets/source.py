"""The source stage: the Hugging Face model itself, in fp32, with its own growing cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel


class HFRunner:
    """A `Runner` over a transformers causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.reset()

    @property
    def vocab(self) -> int:
        """Width of a row of logits."""
        return int(self._model.config.vocab_size)

    @property
    def context(self) -> int:
        """Positions the model was made for."""
        return int(self._model.config.max_position_embeddings)

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]. ValueError: `start` leaves a gap, or the text passes the context."""
        return self._forward(tokens, start, keep=0)

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]: the same at the last position only."""
        row: np.ndarray = self._forward(tokens, start, keep=1)[-1]
        return row

    def reset(self) -> None:
        """Forget the cache."""
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def _forward(self, tokens: Sequence[int], start: int, keep: int) -> np.ndarray:
        import torch

        if not tokens or start + len(tokens) > self.context:
            raise ValueError(f"cannot run {len(tokens)} tokens at {start}: the context is {self.context}")
        self._rewind(start)
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([tokens]),
                cache=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: torch.Tensor = out.logits[0]
        array: np.ndarray = logits.numpy()
        return array

    def _rewind(self, start: int) -> None:
        length = self._cache.get_seq_length()
        if not 0 <= start <= length:
            raise ValueError(f"cannot continue at {start}: the cache holds {length} positions")
        self._cache.crop(start - length)
