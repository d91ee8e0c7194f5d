"""Run a stage over the golden cases and keep what parity needs, never a whole text's logits for long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mobile_export.cases import TOP, Case, Observation
from mobile_export.parity import Agreement, Consistency, kl_divergence

if TYPE_CHECKING:
    import numpy as np

    from mobile_export.types import Runner


def observe(
    runner: Runner, cases: Sequence[Case], references: Mapping[str, Observation] | None = None
) -> Observation:
    """Run each case in one call and gather the logits at every reference's top tokens.

    Each case must fit the runner's context (`Case.within`). ValueError: the runner gave a shape
    that is not [positions, vocab], or a reference is of other cases.
    """
    import numpy as np

    positions = sum(len(case.inputs) for case in cases)
    references = references or {}
    for name, reference in references.items():
        if len(reference.top_ids) != positions:
            raise ValueError(f"reference '{name}' has {len(reference.top_ids)} positions, not {positions}")
    width = min(TOP, runner.vocab)
    result = Observation(
        top_ids=np.full((positions, width), -1, np.int32),
        top_logits=np.full((positions, width), np.nan, np.float32),
        logsumexp=np.full(positions, np.nan),
        next_logprob=np.full(positions, np.nan),
        at={name: np.empty(reference.top_ids.shape, np.float32) for name, reference in references.items()},
    )
    row = 0
    for case in cases:
        for logits, target in zip(_run(runner, case.inputs), case.targets, strict=True):
            _keep(result, row, logits, target)
            for name, reference in references.items():
                result.at[name][row] = logits[reference.top_ids[row]]
            row += 1
    return result


def consistency(
    runner: Runner,
    tokens: Sequence[int],
    stage: str,
    *,
    first: int = 7,
    chunk: int = 16,
    max_kl: float = 1e-3,
    margin: float = 0.1,
) -> Consistency:
    """Run `tokens` in one call, then cut in other ways, and compare full distributions.

    The ways: a chunk of `first` tokens then chunks of `chunk`; token by token; `last_logits` in
    one call; and `last_logits` as a device does (half as a prompt, then token by token). A way
    passes when its largest KL is at most `max_kl` and the most likely token is the same wherever
    the one-call run's top two are more than `margin` apart.
    """
    whole = _run(runner, tokens)
    count, half = len(tokens), (len(tokens) + 1) // 2
    decode = [(0, half), *((at, at + 1) for at in range(half, count))]
    chunks = [(0, min(first, count)), *((at, min(at + chunk, count)) for at in range(first, count, chunk))]
    steps = [(at, at + 1) for at in range(count)]
    ways = {
        "in chunks": _compare_rows(whole, _pieces(runner, tokens, chunks)),
        "token by token": _compare_rows(whole, _pieces(runner, tokens, steps)),
        "last position": _compare_rows(whole[-1:], _lasts(runner, tokens, [(0, count)])),
        "prompt, then decode": _compare_rows(whole[half - 1 :], _lasts(runner, tokens, decode)),
    }
    runner.reset()
    return Consistency(
        stage=stage, ways=tuple(_agreement(way, rows, max_kl, margin) for way, rows in ways.items())
    )


def log_sum_exp(logits: np.ndarray) -> float:
    """Over a whole row [vocab], in fp64; NaN when the row holds a NaN or +inf, or only -inf."""
    import numpy as np

    with np.errstate(all="ignore"):
        row = logits.astype(np.float64)
        top = row.max()
        return float(top + np.log(np.exp(row - top).sum()))


def top_tokens(logits: np.ndarray, count: int) -> np.ndarray:
    """int32 [count]: ids of the largest of a row [vocab], largest first, ties by the smaller id."""
    import numpy as np

    limit = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= limit)
    order = np.lexsort((ids, -logits[ids]))[:count]
    return ids[order].astype(np.int32)


def _keep(result: Observation, row: int, logits: np.ndarray, target: int) -> None:
    total = log_sum_exp(logits)
    if not math.isfinite(total):
        return  # stays NaN, with -1 as its tokens: nothing agrees with it
    result.top_ids[row] = top_tokens(logits, result.top_ids.shape[1])
    result.top_logits[row] = logits[result.top_ids[row]]
    result.logsumexp[row] = total
    result.next_logprob[row] = float(logits[target]) - total


def _run(runner: Runner, tokens: Sequence[int]) -> np.ndarray:
    runner.reset()
    return _checked(runner.logits(tokens, 0), (len(tokens), runner.vocab))


def _pieces(runner: Runner, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    runner.reset()
    for start, end in spans:
        yield from _checked(runner.logits(tokens[start:end], start), (end - start, runner.vocab))


def _lasts(runner: Runner, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    runner.reset()
    for start, end in spans:
        yield _checked(runner.last_logits(tokens[start:end], start), (runner.vocab,))


def _checked(logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if logits.shape != shape:
        raise ValueError(f"a runner gave logits of shape {logits.shape}, expected {shape}")
    return logits


class _Row(NamedTuple):
    kl: float
    dlogit: float
    same: bool
    """The most likely token is the same."""
    gap: float
    """Between the reference's top two logits."""


def _compare_rows(whole: np.ndarray, rows: Iterator[np.ndarray]) -> list[_Row]:
    return [_compare_row(reference, row) for reference, row in zip(whole, rows, strict=True)]


def _compare_row(reference: np.ndarray, row: np.ndarray) -> _Row:
    import numpy as np

    totals = [np.array([log_sum_exp(logits)]) for logits in (reference, row)]
    kl = kl_divergence(reference[None], totals[0], row[None], totals[1])[0]
    second, best = np.partition(reference, -2)[-2:]
    return _Row(
        kl=float(kl),
        dlogit=float(np.abs(row.astype(np.float64) - reference).max()),
        same=bool(row.argmax() == reference.argmax()),
        gap=float(best - second),
    )


def _agreement(way: str, rows: list[_Row], max_kl: float, margin: float) -> Agreement:
    finite = all(math.isfinite(row.kl) and math.isfinite(row.dlogit) for row in rows)
    kl = max(row.kl for row in rows) if finite else None
    return Agreement(
        way=way,
        positions=len(rows),
        kl_max=kl,
        dlogit_max=max(row.dlogit for row in rows) if finite else None,
        top1=sum(row.same for row in rows) / len(rows),
        passed=kl is not None and kl <= max_kl and all(row.same or row.gap <= margin for row in rows),
    )
