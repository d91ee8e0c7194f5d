"""What one stage of an export loses against another: pure metrics on numbers already gathered.

Everything is computed in fp64. A NaN or an infinity anywhere fails a stage; it never passes one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export.cases import Case, Observation
from mobile_export.recipe import Threshold

if TYPE_CHECKING:
    import numpy as np


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A candidate against a reference. None: not a finite number, or nothing to measure it on."""

    positions: int
    broken: int
    """Positions where the candidate said something that is not a finite number."""
    kl_mean: float | None
    """KL(reference || candidate), nats per position: see `kl_divergence`."""
    kl_p99: float | None
    kl_max: float | None
    top1: float
    """Share of positions with the same most likely token."""
    dlogit_max: float | None
    """Largest |logit difference| at the reference's top tokens; nothing is subtracted first."""
    logsumexp_shift_max: float | None
    """Largest |logsumexp difference|: large beside a small KL means a harmless common shift."""
    perplexity_ratio: float | None
    """exp(mean NLL of the candidate) / exp(mean NLL of the reference), over the prompts' own tokens."""
    greedy_mean: float | None
    """Mean length of the greedy match: see `greedy_matches`."""
    greedy_min: int | None
    greedy_whole: int
    """Cases whose whole continuation matches."""
    cases: int


class Depth(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The positions `first` to `last`, both included, of all cases: see `by_position`."""

    first: int
    last: int
    positions: int
    kl_mean: float | None


class StageResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of a report: `stage` measured against `against`."""

    stage: str
    against: str
    metrics: Metrics
    by_position: tuple[Depth, ...] = ()
    """How the loss grows with the number of tokens before."""
    threshold: Threshold | None = None
    """None: reported, not held to a limit."""
    passed: bool


class Agreement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One way to run a text, against running it in one call."""

    way: str
    positions: int
    kl_max: float | None
    dlogit_max: float | None
    top1: float
    passed: bool


class Consistency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether a runner says the same however its input is cut into calls."""

    stage: str
    ways: tuple[Agreement, ...]

    @property
    def passed(self) -> bool:
        """Every way agrees."""
        return bool(self.ways) and all(way.passed for way in self.ways)


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All stages of one model. `msgspec.json` writes and reads it."""

    schema: int = 1
    model: str
    checkpoint: str
    """Digest of the source."""
    target: str = ""
    """The artefact's, as its manifest names it, and the digest of its recipe."""
    recipe: str = ""
    device: str = ""
    """Where the artefact ran, e.g. `qemu-arm64:cortex-a72`; empty: on the machine that wrote this."""
    stages: tuple[StageResult, ...]
    consistency: tuple[Consistency, ...] = ()
    claim: str = ""
    """What the artefact's figures do not show, where it did not run in its own runtime."""

    @property
    def passed(self) -> bool:
        """Something was measured, and nothing failed."""
        verdicts = [line.passed for line in self.stages] + [group.passed for group in self.consistency]
        return bool(verdicts) and all(verdicts)


def kl_divergence(
    reference: np.ndarray, reference_lse: np.ndarray, candidate: np.ndarray, candidate_lse: np.ndarray
) -> np.ndarray:
    """KL(reference || candidate) in nats, fp64 [N], over K tokens plus ONE bucket for all the rest.

    `reference` and `candidate` are logits [N, K] at the same ids, the others their logsumexp [N].
    Merging tokens into a bucket never raises a divergence (data-processing inequality), so this
    is a lower bound of the KL over the whole vocabulary; with the reference's 64 most likely
    tokens outside the bucket it is close to it. A candidate's bucket below 1e-9 counts as 1e-9:
    it is a difference from 1, and what is left there is rounding noise.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        log_p = reference.astype(np.float64) - reference_lse[:, None]
        log_q = candidate.astype(np.float64) - candidate_lse[:, None]
        p, q = np.exp(log_p), np.exp(log_q)
        rest_p = np.maximum(1.0 - p.sum(axis=1), np.finfo(np.float64).tiny)
        rest_q = np.maximum(1.0 - q.sum(axis=1), 1e-9)
        kl = (p * (log_p - log_q)).sum(axis=1) + rest_p * (np.log(rest_p) - np.log(rest_q))
    result: np.ndarray = np.maximum(kl, 0.0)
    return result


def greedy_matches(cases: Sequence[Case], argmax: np.ndarray) -> list[int]:
    """For each case with a continuation, how many greedy tokens a stage gets right before its first miss.

    The continuation is teacher-forced, and up to the first miss forced and free running are the
    same thing: so this is exactly the length of the free-running match. `argmax` is [N].
    """
    lengths, row = [], 0
    for case in cases:
        first = row + len(case.tokens) - 1
        row += len(case.inputs)
        if case.greedy:
            same = argmax[first : first + len(case.greedy)] == case.greedy
            lengths.append(len(case.greedy) if same.all() else int(same.argmin()))
    return lengths


def compare(cases: Sequence[Case], reference: Observation, candidate: Observation, against: str) -> Metrics:
    """Measure `candidate` against `reference`; `against` is the reference's name in `candidate.at`.

    The greedy match is always against the cases' own continuations. ValueError: the shapes differ.
    """
    import numpy as np

    at = candidate.at[against]
    positions = _check_shapes(cases, reference, at)
    fine = np.isfinite(at).all(axis=1)
    fine &= np.isfinite(candidate.logsumexp) & np.isfinite(candidate.next_logprob)
    kl = kl_divergence(reference.top_logits, reference.logsumexp, at, candidate.logsumexp)
    greedy = greedy_matches(cases, candidate.top_ids[:, 0])
    whole = [len(case.greedy) for case in cases if case.greedy]
    with np.errstate(all="ignore"):
        return Metrics(
            positions=positions,
            broken=int((~fine).sum()),
            kl_mean=_finite(kl.mean()),
            kl_p99=_finite(np.quantile(kl, 0.99)),
            kl_max=_finite(kl.max()),
            top1=float((candidate.top_ids[:, 0] == reference.top_ids[:, 0]).mean()),
            dlogit_max=_finite(np.abs(at.astype(np.float64) - reference.top_logits).max()),
            logsumexp_shift_max=_finite(np.abs(candidate.logsumexp - reference.logsumexp).max()),
            perplexity_ratio=_perplexity_ratio(cases, reference, candidate),
            greedy_mean=float(np.mean(greedy)) if greedy else None,
            greedy_min=min(greedy, default=None),
            greedy_whole=sum(found == full for found, full in zip(greedy, whole, strict=True)),
            cases=len(cases),
        )


def by_position(
    cases: Sequence[Case], reference: Observation, candidate: Observation, against: str
) -> tuple[Depth, ...]:
    """Mean KL at the positions 0, 1, 2-3, 4-7, 8-15 and so on of the cases that reach them."""
    import numpy as np

    at = candidate.at[against]
    _check_shapes(cases, reference, at)
    kl = kl_divergence(reference.top_logits, reference.logsumexp, at, candidate.logsumexp)
    place = np.concatenate([np.arange(len(case.inputs)) for case in cases])
    found, first = [], 0
    while first <= place.max(initial=-1):
        last = max(2 * first - 1, first)
        here = kl[(first <= place) & (place <= last)]
        with np.errstate(all="ignore"):
            mean = _finite(here.mean())
        found.append(Depth(first=first, last=last, positions=len(here), kl_mean=mean))
        first = last + 1
    return tuple(found)


def check(metrics: Metrics, threshold: Threshold) -> bool:
    """Whether a stage keeps its limits. Anything not finite fails."""
    if metrics.broken or metrics.kl_mean is None or metrics.dlogit_max is None or metrics.positions < 1:
        return False
    return metrics.kl_mean <= threshold.kl_mean and metrics.top1 >= threshold.top1


def stage_result(
    stage: str,
    against: str,
    metrics: Metrics,
    threshold: Threshold | None,
    depths: tuple[Depth, ...] = (),
) -> StageResult:
    """A line of the report; without a threshold it fails only when something is not finite."""
    passed = check(metrics, threshold or Threshold(kl_mean=float("inf"), top1=0.0))
    return StageResult(
        stage=stage,
        against=against,
        metrics=metrics,
        by_position=depths,
        threshold=threshold,
        passed=passed,
    )


def rounded(metrics: Metrics) -> dict[str, Any]:
    """The figures for a manifest: 4 significant digits, so that noise in the last bits does not show."""
    figures = msgspec.structs.asdict(metrics)
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()
    }


def table(report: ParityReport) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the report, for `console.table`."""
    positions = max((line.metrics.positions for line in report.stages), default=0)
    headings = "stage|KL mean|KL p99|KL max|top-1|max dlogit|perplexity|greedy match|whole|"
    rows = [
        [f"{line.against} -> {line.stage}", *_cells(line.metrics), _verdict(line.passed)]
        for line in report.stages
    ]
    rows += [
        [f"{group.stage}, {way.way}", "", "", *_agreement_cells(way), "", "", "", _verdict(way.passed)]
        for group in report.consistency
        for way in group.ways
    ]
    where = f" on {report.device}" if report.device else ""
    return f"{report.model}: parity{where} over {positions:,} positions", headings.split("|"), rows


def _cells(m: Metrics) -> tuple[str, ...]:
    kl = (_show(m.kl_mean), _show(m.kl_p99), _show(m.kl_max))
    ratio = "-" if m.perplexity_ratio is None else f"x{m.perplexity_ratio:.4f}"
    greedy = f"mean {m.greedy_mean:.1f}, min {m.greedy_min}" if m.greedy_mean is not None else "-"
    return *kl, f"{m.top1:.2%}", _show(m.dlogit_max), ratio, greedy, f"{m.greedy_whole}/{m.cases}"


def _agreement_cells(way: Agreement) -> tuple[str, ...]:
    return _show(way.kl_max), f"{way.top1:.2%}", _show(way.dlogit_max)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _verdict(passed: bool) -> str:
    return "ok" if passed else "FAIL"


def _check_shapes(cases: Sequence[Case], reference: Observation, at: np.ndarray) -> int:
    positions = sum(len(case.inputs) for case in cases)
    for array in (reference.top_ids, at):
        if array.shape != reference.top_logits.shape or len(array) != positions:
            raise ValueError(f"shape {array.shape} does not fit {positions} positions")
    return positions


def _perplexity_ratio(cases: Sequence[Case], reference: Observation, candidate: Observation) -> float | None:
    import numpy as np

    rows = np.concatenate([np.arange(len(case.inputs)) < len(case.tokens) - 1 for case in cases])
    gain = reference.next_logprob[rows] - candidate.next_logprob[rows]
    return _finite(np.exp(gain.mean())) if gain.size else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
