"""Quantize: what codes are, that tied weights stay one, and that nothing float is left."""

import copy
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from mobile_export import dialect
from mobile_export.errors import ExportError
from mobile_export.parity import kl_divergence
from mobile_export.passes.calibrate import calibrate
from mobile_export.passes.quantize import Quantize
from mobile_export.passes.rounding import quantize_per_channel, quantize_per_group
from mobile_export.passes.trace import op_counts
from mobile_export.prompts import load_prompts, render
from mobile_export.recipe import load_recipe
from mobile_export.rewrite import editable, reexport, tensor_of
from mobile_export.targets import reference
from mobile_export.types import Program

assert dialect.rotary is not None  # importing it registered the operators
FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 1000 for index in range(64)]
RECIPE = load_recipe("sandbox")
NEAREST = msgspec.structs.replace(
    RECIPE, quantize=msgspec.structs.replace(RECIPE.quantize, rounding="nearest")
)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, programs_of, spec):
    return programs_of(spec(request.param))[1:]


def float_weights(program):
    return {name: tensor for name, tensor in program.exported.state_dict.items() if tensor.dim() == 2}


def codes_of(program):
    state = program.exported.state_dict
    return {name: tensor for name, tensor in state.items() if name.endswith(("_codes", "_scales"))}


def code_base(weight):
    return weight.replace(".", "_").removesuffix("_weight")


def kl_of(before, after, tokens=TOKENS):
    """Mean KL of two programs, and what they say."""
    said = [reference.open(program).logits(tokens, 0) for program in (before, after)]
    totals = [np.logaddexp.reduce(logits.astype(np.float64), axis=1) for logits in said]
    return kl_divergence(said[0], totals[0], said[1], totals[1]).mean()


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_each_float_matrix_became_its_codes(both, rounding):
    traced, quantized = both
    if rounding == "nearest":
        quantized = Quantize().run(traced, NEAREST)
    counts = op_counts(quantized.exported)
    assert (counts["mobile.linear_int8"], counts["mobile.embedding_int8"]) == (15, 1)
    assert not {"aten.linear", "aten.embedding"} & counts.keys()
    assert quantized.passes[-1] == "quantize" and quantized.dims == traced.dims
    state = quantized.exported.state_dict
    expected = {}
    for name, weight in float_weights(traced).items():
        base = code_base(name)
        expected[f"{base}_codes"], expected[f"{base}_scales"] = quantize_per_channel(weight)
    found = {name: tensor for name, tensor in state.items() if name.endswith(("_codes", "_scales"))}
    tied = {name for name in expected if name.startswith("backbone_embed_tokens")} - found.keys()
    assert found.keys() == expected.keys() - tied
    same = {name for name, tensor in found.items() if torch.equal(tensor, expected[name])}
    if rounding == "nearest":
        assert same == found.keys()
    else:
        assert same == {name for name in found if name.endswith("_scales")}
        moved = [(found[name].int() - expected[name].int()).abs() for name in found.keys() - same]
        assert all(0.001 < (step > 0).float().mean() < 0.5 for step in moved)
    assert all(tensor.dim() == 1 for name, tensor in state.items() if name not in found)


def weights_read(program, op):
    """Names of the codes and scales that calls of an operator read."""
    graph = editable(program.exported).graph
    return [(str(node.args[1].target), str(node.args[2].target)) for node in graph.nodes if node.target == op]


def test_a_tied_head_and_embedding_read_one_tensor(both):
    _, quantized = both
    ops = torch.ops.mobile
    (embedding,) = weights_read(quantized, ops.embedding_int8.default)
    assert weights_read(quantized, ops.linear_int8.default)[-1] == embedding
    whole = [tensor for tensor in quantized.exported.state_dict.values() if tuple(tensor.shape) == (1024, 64)]
    assert len(whole) == 1


def test_an_untied_head_keeps_its_own_codes(programs_of, spec):
    checkpoint, traced, quantized = programs_of(spec(more="&tied=0"))
    ops = torch.ops.mobile
    (embedding,) = weights_read(quantized, ops.embedding_int8.default)
    head = weights_read(quantized, ops.linear_int8.default)[-1]
    assert set(head).isdisjoint(embedding)
    state, model = quantized.exported.state_dict, checkpoint.model()
    for names, weight in ((head, model.lm_head.weight), (embedding, model.model.embed_tokens.weight)):
        codes, scales = quantize_per_channel(weight)
        assert torch.equal(state[names[1]], scales)
        # Nothing is known of an embedding's inputs: its codes are the nearest.
        assert torch.equal(state[names[0]], codes) == (names is embedding)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(reference.open(traced).logits(TOKENS, 0) - expected).max() <= 1e-4


def test_it_says_nearly_what_the_traced_program_says(both):
    assert 1e-6 < kl_of(*both) < 0.02, "codes differ from weights, a little"
    after = reference.open(both[1]).logits(TOKENS, 0)
    chunked = reference.open(both[1])
    parts = [chunked.logits(TOKENS[at : at + 9], at) for at in range(0, 64, 9)]
    assert np.abs(np.concatenate(parts) - after).max() <= 1e-4


def test_compensated_codes_lose_less_of_each_layers_output(both):
    """On texts that calibration has not seen. What a random model says gains little: its layers
    read nearly white noise, and a tied embedding is a little further from its weights.
    """
    traced, compensated = both
    tokenizer, module = traced.source.tokenizer(), editable(traced.exported)
    unseen = [render(prompt, tokenizer)[1][:64] for prompt in load_prompts().items]
    moments = calibrate(module, traced.dims, unseen)
    ours, nearest = codes_of(compensated), codes_of(Quantize().run(traced, NEAREST))
    ratios = []
    for node in module.graph.nodes:
        if node.target == torch.ops.aten.linear.default:
            weight, base = tensor_of(module, node.args[1]), code_base(node.args[1].target)
            (seen,) = moments[node.args[0]].blocks
            lost = []
            for made in (ours, nearest):
                error = weight - made[f"{base}_codes"] * made[f"{base}_scales"][:, None]
                lost.append(float(((error @ seen) * error).sum()))
            ratios.append(lost[0] / lost[1])
    assert len(ratios) == 15 and max(ratios) < 1, ratios
    assert np.mean(ratios) < 0.8, ratios


def test_the_codes_are_the_same_each_time_and_with_one_thread(both):
    traced, quantized = both
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            again = codes_of(Quantize().run(traced, RECIPE))
            assert all(torch.equal(tensor, again[name]) for name, tensor in codes_of(quantized).items())
    finally:
        torch.set_num_threads(threads)


def test_a_program_of_unknown_source_can_only_be_rounded_to_nearest(both):
    orphan = replace(both[0], source=None)
    with pytest.raises(ValueError, match="without a source"):
        Quantize().run(orphan, RECIPE)
    Quantize().check(Quantize().run(orphan, NEAREST), NEAREST)


def altered(program, suffix, change):
    """The program with one of its tensors replaced."""
    exported = copy.copy(program.exported)
    name = next(name for name in exported.state_dict if name.endswith(suffix))
    before = exported.state_dict[name]
    after = change(before.detach().clone())
    kept = isinstance(before, torch.nn.Parameter)
    after = torch.nn.Parameter(after, requires_grad=False) if kept else after
    exported._state_dict = {**exported.state_dict, name: after}
    return replace(program, exported=exported)


def put(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


BAD = {
    "code -128": ("_codes", put(-128)),
    "codes of another type": ("_codes", lambda codes: codes.to(torch.int16)),
    "scale 0": ("_scales", put(0.0)),
    "scale below 0": ("_scales", put(-1.0)),
    "scale inf": ("_scales", put(torch.inf)),
    "scale nan": ("_scales", put(torch.nan)),
}
BAD_INT4 = {
    "code 8": ("down_proj_codes", put(8)),
    "code -9": ("down_proj_codes", put(-9)),
    "scale 0": ("down_proj_scales", put(0.0)),
    "scale inf": ("down_proj_scales", put(torch.inf)),
}
INT4 = msgspec.structs.replace(
    RECIPE, quantize=msgspec.structs.replace(RECIPE.quantize, weights="int4", group_size=32)
)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_all_but_embedding_and_head_become_int4(both, rounding):
    traced, _ = both
    recipe = msgspec.structs.replace(INT4, quantize=msgspec.structs.replace(INT4.quantize, rounding=rounding))
    made = Quantize().run(traced, recipe)
    Quantize().check(made, recipe)
    counts = op_counts(made.exported)
    found = [counts[f"mobile.{op}"] for op in ("linear_int4", "linear_int8", "embedding_int8")]
    assert found == [14, 1, 1] and not {"aten.linear", "aten.embedding"} & counts.keys()
    state, same = made.exported.state_dict, []
    for name, weight in float_weights(traced).items():
        if "proj" in name:
            codes, scales = quantize_per_group(weight, 32)
            assert torch.equal(state[f"{code_base(name)}_scales"], scales)
            same.append(torch.equal(state[f"{code_base(name)}_codes"], codes))
    assert len(same) == 14 and set(same) == {rounding == "nearest"}


@pytest.mark.parametrize("how", BAD_INT4)
def test_the_postcondition_catches_bad_int4(programs_of, spec, how):
    made = Quantize().run(programs_of(spec())[1], INT4)
    with pytest.raises(ExportError, match="quantize made unusable values in '.*down_proj_(codes|scales)'"):
        Quantize().check(altered(made, *BAD_INT4[how]), INT4)


@pytest.mark.parametrize("how", BAD)
def test_the_postcondition_catches_bad_values(programs_of, spec, how):
    quantized = programs_of(spec())[2]
    Quantize().check(quantized, RECIPE)
    with pytest.raises(ExportError, match="quantize made unusable values in '.*_(codes|scales)'"):
        Quantize().check(altered(quantized, *BAD[how]), RECIPE)


@pytest.mark.parametrize("op", ["linear", "embedding"])
def test_the_postcondition_catches_a_float_left_over(programs_of, spec, op):
    from mobile_export.rewrite import swap

    _, _, quantized = programs_of(spec())
    module = editable(quantized.exported)
    target = getattr(torch.ops.mobile, f"{op}_int8").default
    node = next(node for node in module.graph.nodes if node.target == target)
    with module.graph.inserting_before(node):
        weight = module.graph.call_function(torch.ops.aten.to.dtype, (node.args[1], torch.float32))
    if op == "linear":
        swap(node, torch.ops.aten.linear.default, (node.args[0], weight))
    else:
        swap(node, torch.ops.aten.embedding.default, (weight, node.args[0]))
    left = Program(reexport(module, quantized), quantized.dims, quantized.passes)
    with pytest.raises(ExportError, match="left a float linear or embedding"):
        Quantize().check(left, RECIPE)


def test_weights_that_are_not_numbers_are_refused(programs_of, spec):
    _, traced, _ = programs_of(spec())
    broken = altered(traced, "up_proj.weight", put(torch.nan))
    with pytest.raises(ExportError, match="unusable values in 'backbone_layers_0_mlp_up_proj_scales'"):
        Quantize().check(Quantize().run(broken, RECIPE), RECIPE)
