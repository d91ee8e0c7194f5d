"""The default model's bundle: its size, what it says, and that the stock runner says the same."""

import unicodedata

import pytest

from mobile_export import passes, pte
from mobile_export.checkpoint import resolve
from mobile_export.generate import generate
from mobile_export.latency import host
from mobile_export.recipe import parse_recipe
from mobile_export.stages import inputs, parity
from mobile_export.targets import executorch, reference

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def given(real_bundle):
    return inputs(real_bundle)


def test_it_is_small_and_runs_in_its_delegate(real_bundle):
    program = real_bundle.path("program")
    assert program.stat().st_size <= 505e6
    summary = pte.read(program)
    assert summary.segments["shared"] == 151_936 * (896 + 4), "tied codes and scales stand once"
    for method in summary.methods:
        assert method.delegates == {"XnnpackBackend": 26}
        assert not {name for name in method.operators if "linear" in name or "mul" in name or "mm" in name}
        assert method.operators["llama::custom_sdpa.out"] == 24
    assert summary.constants["get_eos_ids"] == [151645, 151643]
    assert summary.constants["get_max_seq_len"] == summary.constants["get_max_context_len"] == 2048


def test_it_carries_the_quantized_programs_codes(real_bundle, missing_codes):
    recipe = parse_recipe(dict(real_bundle.manifest.recipe.table))
    state = passes.run(resolve(), recipe).program.exported.state_dict
    codes = {name: tensor.numpy() for name, tensor in state.items() if name.endswith("_codes")}
    assert len(codes) == 24 * 7 + 2, "169 of the model's, and the rotation's before the head"
    assert not missing_codes(real_bundle.path("program"), codes, recipe.executorch.mlp_parts)


def test_every_stage_keeps_its_limits_on_the_whole_golden(given):
    report = parity(given)
    for line in report.stages:
        print(line.against, line.stage, line.metrics)
    failed = [line for line in report.stages if not line.passed]
    failed += [(group.stage, way) for group in report.consistency for way in group.ways if not way.passed]
    assert report.passed, failed
    assert report.stages[-1].metrics.positions >= 2000
    assert report.stages[-1].metrics.kl_mean > 0


def test_its_code_does_what_was_asked(real_bundle, writes_right_code):
    writes_right_code(real_bundle, max_tokens=200)


@pytest.mark.parametrize(
    "ask", ["Name three primary colours.", "Write two sentences about a cafe\u0301 in 北京."]
)
def test_the_stock_runner_says_the_same(real_bundle, stock_runner, ask):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(real_bundle.path("tokenizer")))
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ask}],
        chat_template=real_bundle.path("chat-template").read_text("utf-8"),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert real_bundle.manifest.io.normalize == "NFC"
    theirs = stock_runner(real_bundle, unicodedata.normalize("NFC", text), 40)
    ours = "".join(generate(real_bundle, ask, max_tokens=40))
    assert "".join(theirs).removesuffix("<|im_end|>").rstrip("\ufffd") == ours.rstrip("\ufffd")
    assert len(ours) > 10


def test_its_quantized_program_says_nearly_what_it_says(given):
    """Through the runtime with a prompt of many tokens: the silent wrong results that design.md lists."""
    recipe = parse_recipe(dict(given.bundle.manifest.recipe.table))
    program = reference.open(passes.run(given.checkpoint, recipe).program)
    tokens = list(given.golden.cases[0].inputs)[:48]
    said = executorch.open(given.bundle.path("program")).last_logits(tokens, 0)
    expected = program.logits(tokens, 0)[-1]
    assert said.argmax() == expected.argmax()
    assert abs(said - expected).max() < 3


def test_it_is_fast_enough_to_talk_to(real_bundle):
    (speed,) = host.measure(real_bundle.folder, (1,))
    print(speed)
    assert speed.decode > 2 and speed.prefill > 10 and speed.load_seconds < 30
    assert speed.peak_bytes < 4e9
