"""Speculative decoding: a small artefact drafts tokens, a large one checks them all in one prefill.

Greedy, so that the answer is the large one's own, token for token: a drafted token stands where it is
the target's most likely one, and the target's own token replaces the first that is not (Leviathan et
al., arXiv 2211.17192, at temperature 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobile_export.types import Runner


@dataclass
class Speculation:
    """What came out, and how it was come by."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that were the target's too."""
    checks: int = 0
    """Calls of the target after the prompt."""


def greedy(runner: Runner, prompt: Sequence[int], count: int) -> list[int]:
    """`count` most likely tokens after `prompt`; no token ends the sequence."""
    tokens = [_most_likely(runner, prompt, 0)]
    for at in range(len(prompt), len(prompt) + count - 1):
        tokens.append(_most_likely(runner, tokens[-1:], at))
    return tokens


def speculate(
    target: Runner, draft: Runner, prompt: Sequence[int], count: int, ahead: int = 4
) -> Speculation:
    """The same `count` tokens as `greedy(target, ...)`, with `ahead` tokens drafted at a time.

    Both artefacts have one vocabulary. What a refused token left in a cache is overwritten by the
    token that takes its place before anything reads it.
    """
    done = Speculation([_most_likely(target, prompt, 0)])
    sequence = [*prompt, *done.tokens]
    heard = 0
    """Positions of `sequence` that the draft's cache holds."""
    while len(done.tokens) < count:
        wanted = min(ahead, count - len(done.tokens) - 1)
        guesses: list[int] = []
        for _ in range(wanted):
            guesses.append(_most_likely(draft, [*sequence, *guesses][heard:], heard))
            heard = len(sequence) + len(guesses) - 1
        known = len(sequence) - 1
        said = target.logits([sequence[-1], *guesses], known).argmax(axis=1).tolist()
        right = next((i for i, guess in enumerate(guesses) if guess != said[i]), len(guesses))
        done.drafted, done.accepted, done.checks = (
            done.drafted + len(guesses),
            done.accepted + right,
            done.checks + 1,
        )
        done.tokens += said[: right + 1]
        sequence += said[: right + 1]
        heard = min(heard, len(sequence) - 1)
    return done


def _most_likely(runner: Runner, tokens: Sequence[int], start: int) -> int:
    return int(runner.last_logits(tokens, start).argmax())
