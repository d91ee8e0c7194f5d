"""Calibration: what is run, and what is kept of it."""

import pytest
import torch

from mobile_export.passes import calibrate
from mobile_export.passes.calibrate import Moments, texts
from mobile_export.prompts import load_prompts
from mobile_export.rewrite import editable


@pytest.fixture
def small(programs_of, spec):
    checkpoint, traced, _ = programs_of(spec())
    return checkpoint, traced


def test_the_texts_are_none_of_the_goldens():
    ours = load_prompts(calibrate.Path(calibrate.__file__).parents[1] / "calibration.toml").items
    judges = load_prompts().items

    def lines(prompts):
        whole = [prompt.text or "\n".join(turn.content for turn in prompt.messages) for prompt in prompts]
        return {line.strip() for text in whole for line in text.splitlines() if len(line.strip()) > 25}

    assert len(ours) >= 10 and not lines(ours) & lines(judges)
    assert not {prompt.name for prompt in ours} & {prompt.name for prompt in judges}


def test_texts_are_cut(small):
    checkpoint, _ = small
    assert max(map(len, texts(checkpoint, 100_000))) == calibrate.LONGEST
    assert {len(tokens) for tokens in texts(checkpoint, 9)} == {9}


def test_moments_are_of_what_the_linears_read(small):
    """The model itself, with hooks, says what its layers read."""
    checkpoint, traced = small
    model, tokens = checkpoint.model(), [list(range(5, 45)), list(range(100, 130))]
    expected = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            moments = expected[name.replace("model.", "backbone.").replace("lm_head", "head")] = Moments(
                [torch.zeros(part.in_features, part.in_features)]
            )
            part.register_forward_pre_hook(lambda _, args, moments=moments: moments.add(args[0][0]))
    with torch.inference_mode():
        for text in tokens:
            model(input_ids=torch.tensor([text]))
    module = editable(traced.exported)
    found = calibrate.calibrate(module, traced.dims, tokens)
    assert len(found) == 4 * 2 + 1
    linears = [node for node in module.graph.nodes if node.target == torch.ops.aten.linear.default]
    assert len(linears) == len(expected)
    for node in linears:
        moments, right = found[node.args[0]], expected[str(node.args[1].target).removesuffix(".weight")]
        assert moments.tokens == right.tokens == 70
        torch.testing.assert_close(moments.blocks[0], right.blocks[0], rtol=1e-3, atol=1e-2)


def test_a_text_of_one_token_and_inputs_of_zeros():
    moments = Moments([torch.zeros(3, 3)])
    moments.add(torch.tensor([[0.0, 3.0, 0.0]]))
    torch.testing.assert_close(moments.blocks[0], torch.diag(torch.tensor([0.0, 3.0, 0.0])))
    moments.add(torch.zeros(4, 3))
    assert torch.isfinite(moments.blocks[0]).all() and moments.tokens == 5


def test_all_tokens_count_alike_whatever_their_power():
    seeded = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    loud, quiet = Moments([torch.zeros(3, 3)]), Moments([torch.zeros(3, 3)])
    quiet.add(seeded)
    loud.add(seeded * torch.tensor([1.0, 1e4, 1.0, 1.0, 1e-4, 1.0])[:, None])
    torch.testing.assert_close(loud.blocks[0], quiet.blocks[0])
