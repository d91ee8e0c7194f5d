"""How surprised a model is by a text: negative log-likelihood of its own tokens, in nats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from mobile_export.observe import log_sum_exp

if TYPE_CHECKING:
    from mobile_export.types import Runner

WINDOW = 512
"""Tokens that a text is cut into; less where the context is shorter."""


class TextScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model says of one text."""

    name: str
    kind: str
    tokens: int
    """Predicted ones: all but the first of each window."""
    nll: float | None
    """Sum over them of -log p(token | those before it in its window), nats; None: not finite."""


def nll(runner: Runner, tokens: Sequence[int], window: int) -> tuple[int, float | None]:
    """Predicted tokens and the sum of their negative log-likelihoods, in fp64.

    The text is cut into windows of `window` tokens, one after another, each from an empty cache. The
    log-probabilities are those of logits over the whole vocabulary. ValueError: a runner gave another
    shape than [positions, vocab].
    """
    count, total = 0, 0.0
    for start in range(0, len(tokens), window):
        part = list(tokens[start : start + window])
        if len(part) < 2:
            continue
        runner.reset()
        rows = runner.logits(part[:-1], 0)
        if rows.shape != (len(part) - 1, runner.vocab):
            raise ValueError(f"a runner gave logits of shape {rows.shape} for {len(part) - 1} tokens")
        for row, target in zip(rows, part[1:], strict=True):
            total += log_sum_exp(row) - float(row[target])
        count += len(part) - 1
    return count, total if math.isfinite(total) else None


def perplexity(scores: Iterable[TextScore]) -> float | None:
    """exp(sum of nll / sum of tokens); None: not finite, or nothing was predicted."""
    count, total = 0, 0.0
    for score in scores:
        if score.nll is None:
            return None
        count, total = count + score.tokens, total + score.nll
    if not count:
        return None
    try:
        return math.exp(total / count)
    except OverflowError:
        return None
