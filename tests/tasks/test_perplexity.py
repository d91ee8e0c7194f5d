"""Perplexity is that of transformers, to the last digits of fp32."""

import math

import numpy as np
import pytest
import torch

from mobile_export.checkpoint import resolve
from mobile_export.targets.source import HFRunner
from mobile_export.tasks.perplexity import TextScore, nll, perplexity
from mobile_export.tasks.sets import load_texts


@pytest.fixture(scope="module")
def checkpoint(spec):
    return resolve(spec())


@pytest.fixture(scope="module")
def tokens(checkpoint):
    return checkpoint.tokenizer()(load_texts().items[4].text)["input_ids"][:150]


def expected(checkpoint, tokens, window):
    """By transformers' own loss, which is a mean over a window's predicted tokens."""
    count, total = 0, 0.0
    model = checkpoint.model()
    for start in range(0, len(tokens), window):
        part = torch.tensor([tokens[start : start + window]])
        if part.shape[1] > 1:
            with torch.inference_mode():
                total += model(input_ids=part, labels=part).loss.item() * (part.shape[1] - 1)
            count += part.shape[1] - 1
    return count, total


@pytest.mark.parametrize("window", [150, 64, 149, 2])
def test_it_is_that_of_transformers(checkpoint, tokens, window):
    assert len(tokens) == 150
    count, total = nll(HFRunner(checkpoint.model()), tokens, window)
    assert (count, total) == (pytest.approx(expected(checkpoint, tokens, window), rel=2e-6))
    assert count == 150 - math.ceil(150 / window)


def test_another_model_or_another_text_is_another_figure(checkpoint, tokens, spec):
    _, first = nll(HFRunner(checkpoint.model()), tokens, 150)
    _, other = nll(HFRunner(resolve(spec(more="&seed=1")).model()), tokens, 150)
    _, turned = nll(HFRunner(checkpoint.model()), tokens[::-1], 150)
    assert len({round(value, 2) for value in (first, other, turned)}) == 3


class Fixed:
    """Says the same row at every position."""

    vocab, context = 4, 64

    def __init__(self, row, rows=None):
        self.row, self.rows = row, rows

    def logits(self, tokens, start):
        return np.tile(np.array(self.row, np.float32), (self.rows or len(tokens), 1))

    def last_logits(self, tokens, start):
        return np.array(self.row, np.float32)

    def reset(self):
        pass


def test_a_known_distribution():
    row = np.log([0.5, 0.25, 0.125, 0.125])
    assert nll(Fixed(row), [3, 0, 1, 2], 64) == (3, pytest.approx(math.log(2 * 4 * 8), rel=1e-6))
    assert nll(Fixed(row + 100), [3, 0, 1, 2], 64) == (3, pytest.approx(math.log(64), rel=1e-5))
    assert nll(Fixed(row), [0], 64) == nll(Fixed(row), [], 64) == (0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_figure(bad):
    assert nll(Fixed([0.0, bad, 0.0, 0.0]), [0, 1, 2], 64) == (2, None)
    assert nll(Fixed([0.0, -math.inf, 0.0, 0.0]), [0, 1], 64) == (1, None), "a token that cannot be"


def test_a_runner_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4\) for 2 tokens"):
        nll(Fixed([0.0] * 4, rows=1), [0, 1, 2], 64)


def score(tokens, nll):
    return TextScore(name="a", kind="code", tokens=tokens, nll=nll)


def test_texts_count_by_their_tokens():
    assert perplexity([score(1, 2.0), score(3, 2.0)]) == pytest.approx(math.e)
    assert perplexity([score(1, 2.0), score(3, None)]) is None
    assert perplexity([]) is None and perplexity([score(0, 0.0)]) is None
    assert perplexity([score(1, 1e4)]) is None
