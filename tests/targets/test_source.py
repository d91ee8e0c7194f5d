"""The source stage is the transformers model, cache included."""

import numpy as np
import pytest

from mobile_export.checkpoint import resolve
from mobile_export.targets.source import HFRunner

TOKENS = [5, 300, 17, 42, 256, 99, 7]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request):
    return resolve(f"sandbox:{request.param}?layers=2&hidden=64&vocab=512&context=32").model()


@pytest.fixture
def runner(model):
    return HFRunner(model)


def test_it_says_what_the_model_says(runner, model):
    import torch

    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    said = runner.logits(TOKENS, 0)
    assert (runner.vocab, runner.context, said.dtype) == (512, 32, np.float32)
    assert np.array_equal(said, expected)
    runner.reset()
    assert np.allclose(runner.last_logits(TOKENS, 0), expected[-1], atol=1e-5)


def test_it_continues_and_rewinds(runner):
    whole = runner.logits(TOKENS, 0)
    again = runner.logits([TOKENS[3], 500, 501], 3)  # over the rest of the first call
    assert np.allclose(again[0], whole[3], atol=1e-5)
    assert np.allclose(runner.logits(TOKENS[4:], 4), whole[4:], atol=1e-5)
    assert np.array_equal(runner.logits(TOKENS, 0), whole)


@pytest.mark.parametrize(("tokens", "start"), [([1], 8), ([1], -1), ([], 0), ([1] * 33, 0), ([1] * 26, 7)])
def test_it_refuses_a_gap_and_too_much(runner, tokens, start):
    runner.logits(TOKENS, 0)
    with pytest.raises(ValueError, match="cannot"):
        runner.logits(tokens, start)
    assert runner.logits([1], 7).shape == (1, 512)  # a refusal changes nothing
