"""Metrics on distributions whose answers are known."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mobile_export.cases import Case, Observation
from mobile_export.observe import log_sum_exp, top_tokens
from mobile_export.parity import (
    Agreement,
    Consistency,
    ParityReport,
    by_position,
    check,
    compare,
    greedy_matches,
    kl_divergence,
    rounded,
    stage_result,
    table,
)
from mobile_export.recipe import Threshold

LIMIT = Threshold(kl_mean=0.01, top1=0.95)
VOCAB, WIDTH = 100, 64


def case(prompt: int = 5, greedy: int = 4) -> Case:
    tokens = tuple(range(prompt + greedy))
    return Case(
        name="a", kind="code", text="a", tokens=tokens[:prompt], greedy=tokens[prompt:], greedy_text="b"
    )


def logits_of(cases: list[Case], seed: int = 0) -> np.ndarray:
    """[N, VOCAB]; the most likely token is always the one that follows."""
    targets = [target for item in cases for target in item.targets]
    logits = np.random.default_rng(seed).standard_normal((len(targets), VOCAB)).astype(np.float32)
    logits[np.arange(len(targets)), targets] = 6.0
    return logits


def seen(cases: list[Case], logits: np.ndarray, reference: Observation | None = None) -> Observation:
    targets = [target for item in cases for target in item.targets]
    totals = np.array([log_sum_exp(row) for row in logits])
    ids = np.stack(
        [top_tokens(row, WIDTH) if np.isfinite(row).all() else np.full(WIDTH, -1) for row in logits]
    )
    gathered = {} if reference is None else {"ref": np.take_along_axis(logits, reference.top_ids, 1)}
    return Observation(
        top_ids=ids.astype(np.int32),
        top_logits=np.take_along_axis(logits, ids, 1),
        logsumexp=totals,
        next_logprob=logits[np.arange(len(targets)), targets].astype(np.float64) - totals,
        at=gathered,
    )


def measure(change, cases=None):
    """Metrics of the reference's logits after `change` edited a copy of them."""
    cases = cases or [case(), case(3, 2)]
    logits = logits_of(cases)
    reference, edited = seen(cases, logits), logits.copy()
    change(edited)
    return compare(cases, reference, seen(cases, edited, reference), "ref")


def test_identical_is_zero():
    m = measure(lambda logits: None)
    assert (m.kl_mean, m.kl_max, m.dlogit_max, m.top1, m.perplexity_ratio) == (0, 0, 0, 1, 1)
    assert (m.positions, m.broken, m.cases) == (12, 0, 2)
    assert (m.greedy_mean, m.greedy_min, m.greedy_whole) == (3, 2, 2)
    assert check(m, Threshold(kl_mean=0.0, top1=1.0))


def test_the_loss_by_position_is_that_of_the_tokens_there():
    cases = [case(), case(3, 2)]
    logits = logits_of(cases)
    reference, edited = seen(cases, logits), logits.copy()
    edited[[6, 10], :50] += 1.0  # position 6 of the first case, 2 of the second
    candidate = seen(cases, edited, reference)
    depths = by_position(cases, reference, candidate, "ref")
    assert [(one.first, one.last, one.positions) for one in depths] == [
        (0, 0, 2),
        (1, 1, 2),
        (2, 3, 4),
        (4, 7, 4),
    ]
    assert [one.kl_mean > 1e-4 for one in depths] == [False, False, True, True]
    whole = compare(cases, reference, candidate, "ref").kl_mean
    assert sum(one.kl_mean * one.positions for one in depths) / 12 == pytest.approx(whole)


def test_a_position_that_is_not_finite_has_no_mean():
    cases = [case()]
    logits = logits_of(cases)
    reference, edited = seen(cases, logits), logits.copy()
    edited[1] = np.nan
    depths = by_position(cases, reference, seen(cases, edited, reference), "ref")
    assert [one.kl_mean is None for one in depths] == [False, True, False, False]


def test_known_divergence():
    # p = (1/2, 1/4 | 1/4), q = (1/4, 1/2 | 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
    p, q = (np.log(np.array([row], np.float32)) for row in ([0.5, 0.25], [0.25, 0.5]))
    assert kl_divergence(p, np.zeros(1), q, np.zeros(1)) == pytest.approx(0.25 * math.log(2), rel=1e-6)


def test_a_common_shift_is_not_a_divergence():
    def shift(logits):
        logits += 2.0

    m = measure(shift)
    assert m.kl_max < 1e-6
    assert m.dlogit_max == pytest.approx(2.0)
    assert m.logsumexp_shift_max == pytest.approx(2.0, abs=1e-5)
    assert m.perplexity_ratio == pytest.approx(1.0, abs=1e-6)


def test_confident_positions_do_not_make_noise():
    # Nothing outside the top: 1 - sum(p) is rounding noise there, and must not become a divergence.
    def confident(logits):
        logits += np.float32(1e-6) * np.arange(VOCAB, dtype=np.float32)

    cases = [case()]
    logits = logits_of(cases) * 10
    reference, edited = seen(cases, logits), logits.copy()
    confident(edited)
    m = compare(cases, reference, seen(cases, edited, reference), "ref")
    assert m.kl_max < 1e-9


def test_a_swapped_argmax_ends_the_greedy_match():
    def swap(logits):
        logits[6, 99] = 20.0  # case a: 5 prompt tokens, so row 4 predicts its first greedy token

    m = measure(swap)
    assert m.top1 == pytest.approx(11 / 12)
    assert (m.greedy_min, m.greedy_mean, m.greedy_whole) == (2, 2.0, 1)
    assert not check(m, LIMIT)


def test_a_miss_inside_the_prompt_does_not_count_as_greedy():
    def swap(logits):
        logits[2, 99] = 20.0

    m = measure(swap)
    assert (m.greedy_min, m.greedy_whole) == (2, 2)
    assert m.perplexity_ratio > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_anything_not_finite_fails(bad):
    def spoil(logits):
        logits[3, 7] = bad

    m = measure(spoil)
    result = stage_result("x", "ref", m, None)
    # -inf at a token outside the reference's top is a legal logit of a masked token.
    outside = bad == -math.inf and m.broken == 0
    assert outside or (m.broken == 1 and not check(m, Threshold(kl_mean=1e9, top1=0.0)))
    assert result.passed == outside
    assert msgspec.json.decode(msgspec.json.encode(result), type=type(result)) == result


def test_minus_infinity_at_a_likely_token_fails():
    def spoil(logits):
        logits[3, 4] = -math.inf

    m = measure(spoil)
    assert (m.broken, m.kl_mean) == (1, None)
    assert not check(m, LIMIT)


def test_a_broken_reference_fails_too():
    cases = [case()]
    logits = logits_of(cases)
    good = seen(cases, logits)
    broken = logits.copy()
    broken[2] = math.nan
    reference = seen(cases, broken)
    candidate = Observation(good.top_ids, good.top_logits, good.logsumexp, good.next_logprob)
    candidate.at["ref"] = good.top_logits
    assert not check(compare(cases, reference, candidate, "ref"), LIMIT)


def test_wrong_shape_is_refused():
    cases = [case()]
    reference = seen(cases, logits_of(cases))
    candidate = seen(cases, logits_of(cases), reference)
    candidate.at["ref"] = candidate.at["ref"][:-1]
    with pytest.raises(ValueError, match="does not fit 8 positions"):
        compare(cases, reference, candidate, "ref")
    with pytest.raises(ValueError, match="does not fit 16 positions"):
        compare([case(), case()], reference, seen(cases, logits_of(cases), reference), "ref")


def test_cases_without_a_continuation_or_a_next_prompt_token():
    m = measure(lambda logits: None, [case(5, 0), case(1, 3)])
    assert (m.greedy_mean, m.greedy_whole, m.cases) == (3, 1, 2)
    assert measure(lambda logits: None, [case(1, 2)]).perplexity_ratio is None
    assert measure(lambda logits: None, [case(4, 0)]).greedy_min is None
    assert greedy_matches([case(4, 0)], np.zeros(3)) == []


def test_within_keeps_what_fits():
    whole = case(5, 4)
    for context in range(1, 12):
        cut = whole.within(context)
        assert cut.inputs == whole.inputs[:context]
        assert cut.targets == whole.targets[:context]


rows = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12)


@given(rows, rows, st.integers(1, 12))
@example([0.0] * 12, [0.0] * 11 + [-30.0], 11)
@example([0.0] * 12, [30.0] * 11 + [-30.0], 11)  # the bucket's mass is below fp64's rounding of 1
def test_bucketed_divergence_is_a_lower_bound(a, b, kept):
    reference, candidate = (np.array([row], np.float32) for row in (a, b))
    totals = [np.array([log_sum_exp(row[0])]) for row in (reference, candidate)]
    top = top_tokens(reference[0], kept)
    bound = kl_divergence(reference[:, top], totals[0], candidate[:, top], totals[1])[0]
    log_p, log_q = reference[0].astype(float) - totals[0], candidate[0].astype(float) - totals[1]
    full = (np.exp(log_p) * (log_p - log_q)).sum()
    assert 0 <= bound <= full + 1e-6 * full + 1e-9
    if kept >= 11 and log_q.min() > math.log(1e-6):
        assert bound == pytest.approx(full, abs=1e-9)


def test_the_bound_is_close_on_a_peaked_vocabulary():
    generator = np.random.default_rng(1)
    reference = (3 * generator.standard_normal((50, 512))).astype(np.float32)
    candidate = reference + (0.1 * generator.standard_normal((50, 512))).astype(np.float32)
    totals = [np.array([log_sum_exp(row) for row in rows]) for rows in (reference, candidate)]
    full = kl_divergence(reference, totals[0], candidate, totals[1])
    ids = np.stack([top_tokens(row, 64) for row in reference])
    near = [np.take_along_axis(rows, ids, 1) for rows in (reference, candidate)]
    bound = kl_divergence(near[0], totals[0], near[1], totals[1])
    assert (bound <= full + 1e-12).all()
    assert bound.mean() > 0.9 * full.mean()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=5, max_size=40))
def test_top_tokens_breaks_ties_by_id(values):
    row = np.array(values, np.float32)
    assert top_tokens(row, 5).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:5]


def test_log_sum_exp_of_broken_rows_is_not_finite():
    assert log_sum_exp(np.array([1000.0, 1000.0], np.float32)) == pytest.approx(1000 + math.log(2))
    for row in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        assert math.isnan(log_sum_exp(np.array(row, np.float32)))


def report(**parts) -> ParityReport:
    return ParityReport(model="m", checkpoint="0" * 64, **parts)


def test_report_passes_only_when_all_of_something_passed():
    good = stage_result("quantized", "traced", measure(lambda logits: None), LIMIT)
    bad = msgspec.structs.replace(good, passed=False)
    steady = Agreement(way="in chunks", positions=3, kl_max=0.0, dlogit_max=0.0, top1=1.0, passed=True)
    ways = Consistency(stage="artifact", ways=(steady,))
    wild = Consistency(stage="artifact", ways=(msgspec.structs.replace(steady, passed=False), steady))
    assert report(stages=(good,), consistency=(ways,)).passed
    assert not report(stages=(good, bad)).passed
    assert not report(stages=(good,), consistency=(wild,)).passed
    assert not report(stages=(good,), consistency=(Consistency(stage="x", ways=()),)).passed
    assert not report(stages=()).passed


def test_report_as_json_and_as_a_table():
    good = stage_result("quantized", "traced", measure(lambda logits: None), LIMIT)
    odd = Agreement(way="in chunks", positions=3, kl_max=None, dlogit_max=None, top1=0.5, passed=False)
    whole = report(stages=(good,), consistency=(Consistency(stage="artifact", ways=(odd,)),))
    assert msgspec.json.decode(msgspec.json.encode(whole), type=ParityReport) == whole
    title, columns, lines = table(whole)
    assert "12 positions" in title
    assert {len(line) for line in lines} == {len(columns)}
    assert lines[0][0] == "traced -> quantized" and lines[0][-1] == "ok"
    assert lines[1][0] == "artifact, in chunks" and lines[1][-1] == "FAIL"


def test_rounded_keeps_four_digits():
    m = msgspec.structs.replace(measure(lambda logits: None), kl_mean=0.00123456789, top1=0.98765432)
    figures = rounded(m)
    assert (figures["kl_mean"], figures["top1"], figures["positions"]) == (0.001235, 0.9877, 12)
