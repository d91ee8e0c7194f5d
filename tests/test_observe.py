"""Consistency catches the ways a runner goes wrong; the runner underneath is a real one."""

import math

import numpy as np
import pytest

from mobile_export.cases import Case
from mobile_export.checkpoint import resolve
from mobile_export.observe import consistency, log_sum_exp, observe
from mobile_export.parity import compare
from mobile_export.targets.source import HFRunner

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 509, 45)]
CASES = [
    Case(
        name="a", kind="code", text="", tokens=tuple(TOKENS[:9]), greedy=tuple(TOKENS[9:12]), greedy_text=""
    ),
    Case(name="b", kind="mixed", text="", tokens=tuple(TOKENS[20:40]), greedy=(), greedy_text=""),
]


@pytest.fixture(scope="module")
def model():
    return resolve("sandbox:qwen2?layers=2&hidden=64&vocab=512").model()


@pytest.fixture
def runner(model):
    return HFRunner(model)


class Wrapped:
    """A runner around a runner; subclasses break one thing."""

    def __init__(self, inner):
        self.inner = inner
        self.vocab, self.context = inner.vocab, inner.context

    def logits(self, tokens, start):
        return self.inner.logits(tokens, start)

    def last_logits(self, tokens, start):
        return self.inner.last_logits(tokens, start)

    def reset(self):
        self.inner.reset()


class LateCache(Wrapped):
    """Writes each continuation one position too early, over the last token."""

    def logits(self, tokens, start):
        return self.inner.logits(tokens, max(start - 1, 0))

    def last_logits(self, tokens, start):
        return self.inner.last_logits(tokens, max(start - 1, 0))


class Amnesia(Wrapped):
    """Each call starts anew."""

    def logits(self, tokens, start):
        self.inner.reset()
        return self.inner.logits(tokens, 0)


class BlurredPrefill(Wrapped):
    """Wrong only when a call has more than one row, as a broken GEMM would be."""

    def logits(self, tokens, start):
        result = self.inner.logits(tokens, start)
        return result if len(tokens) == 1 else result[:, ::-1].copy()


class OtherPath(Wrapped):
    """The device's path gives the first position of a call, not the last."""

    def last_logits(self, tokens, start):
        return self.inner.logits(tokens, start)[0]


class Swapped(Wrapped):
    """The two most likely tokens change places on the device's path."""

    def last_logits(self, tokens, start):
        row = self.inner.last_logits(tokens, start).copy()
        first, second = row.argsort()[::-1][:2]
        row[[first, second]] = row[[second, first]]
        return row


class NotANumber(Wrapped):
    def logits(self, tokens, start):
        result = self.inner.logits(tokens, start).copy()
        result[-1, 5] = math.nan if start else result[-1, 5]
        return result


def failed(runner) -> set[str]:
    return {way.way for way in consistency(runner, TOKENS, "test").ways if not way.passed}


def test_a_sound_runner_agrees_with_itself(runner):
    result = consistency(runner, TOKENS, "source")
    assert result.passed and result.stage == "source"
    assert [way.positions for way in result.ways] == [45, 45, 1, 23]
    assert max(way.kl_max for way in result.ways) < 1e-6


@pytest.mark.parametrize(
    ("broken", "ways"),
    [
        (LateCache, {"in chunks", "token by token", "prompt, then decode"}),
        (Amnesia, {"in chunks", "token by token"}),
        (BlurredPrefill, {"token by token", "last position", "prompt, then decode"}),
        (OtherPath, {"last position", "prompt, then decode"}),
        (NotANumber, {"in chunks", "token by token"}),
    ],
)
def test_each_fault_is_caught_where_it_is(runner, broken, ways):
    assert ways <= failed(broken(runner))


def test_another_top_token_fails_unless_it_was_a_near_tie(runner):
    strict = consistency(Swapped(runner), TOKENS, "test", max_kl=math.inf)
    lax = consistency(Swapped(runner), TOKENS, "test", max_kl=math.inf, margin=math.inf)
    assert [way.top1 for way in strict.ways] == [1, 1, 0, 0]
    assert [way.passed for way in strict.ways][-1] is False
    assert lax.passed


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8])
def test_short_texts(runner, length):
    assert consistency(runner, TOKENS[:length], "source").passed


def test_observe_gathers_what_the_model_said(runner, model):
    import torch

    seen = observe(runner, CASES)
    with torch.inference_mode():
        direct = [model(input_ids=torch.tensor([case.inputs])).logits[0].numpy() for case in CASES]
    rows = np.concatenate(direct)
    assert seen.top_ids.shape == (len(rows), 64) == seen.top_logits.shape
    assert seen.top_ids.dtype == np.int32 and seen.top_logits.dtype == np.float32
    assert (seen.top_ids[:, 0] == rows.argmax(1)).all()
    assert np.allclose(seen.top_logits, np.sort(rows, 1)[:, ::-1][:, :64])
    targets = [target for case in CASES for target in case.targets]
    expected = [row[target] - log_sum_exp(row) for row, target in zip(rows, targets, strict=True)]
    assert np.allclose(seen.next_logprob, expected, atol=1e-6)


def test_observe_against_a_reference(runner):
    reference = observe(runner, CASES)
    again = observe(runner, CASES, {"source": reference})
    assert (again.at["source"] == reference.top_logits).all()
    assert compare(CASES, reference, again, "source").kl_max == 0
    with pytest.raises(ValueError, match="positions"):
        observe(runner, CASES[:1], {"source": reference})


def test_observe_marks_rows_that_are_not_finite(runner):
    class Spoilt(Wrapped):
        def logits(self, tokens, start):
            result = self.inner.logits(tokens, start).copy()
            result[2, 3] = math.nan
            return result

    reference = observe(runner, CASES)
    seen = observe(Spoilt(runner), CASES, {"source": reference})
    assert np.isnan(seen.logsumexp).sum() == 2
    assert (seen.top_ids[2] == -1).all()
    metrics = compare(CASES, reference, seen, "source")
    assert (metrics.broken, metrics.kl_mean, metrics.kl_p99) == (2, None, None)


def test_a_wrong_shape_is_refused(runner):
    class Narrow(Wrapped):
        def logits(self, tokens, start):
            return self.inner.logits(tokens, start)[:, :-1]

    with pytest.raises(ValueError, match=r"\(11, 511\), expected \(11, 512\)"):
        observe(Narrow(runner), CASES)
