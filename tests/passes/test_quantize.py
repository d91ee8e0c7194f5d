"""Quantize: what codes are, that tied weights stay one, and that nothing float is left."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mobile_export import dialect
from mobile_export.errors import ExportError
from mobile_export.parity import kl_divergence
from mobile_export.passes.quantize import Quantize, quantize_per_channel
from mobile_export.passes.trace import op_counts
from mobile_export.recipe import load_recipe
from mobile_export.rewrite import editable, reexport
from mobile_export.targets import reference
from mobile_export.types import Program

assert dialect.rotary is not None  # importing it registered the operators
FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 1000 for index in range(64)]
RECIPE = load_recipe("sandbox")
WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1e-30]),
)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, programs_of, spec):
    return programs_of(spec(request.param))[1:]


def float_weights(program):
    return {name: tensor for name, tensor in program.exported.state_dict.items() if tensor.dim() == 2}


@settings(max_examples=200, deadline=None)
@given(WEIGHTS)
def test_each_weight_is_within_half_a_step(weight):
    weight = torch.from_numpy(weight)
    codes, scales = quantize_per_channel(weight)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert codes.shape == weight.shape and scales.shape == weight.shape[:1]
    assert codes.min() >= -127
    assert torch.isfinite(scales).all() and (scales > 0).all()
    back = codes.double() * scales[:, None].double()
    assert ((back - weight.double()).abs() <= scales[:, None].double() * 0.5001).all()
    largest = weight.abs().amax(1)
    used = codes.abs().amax(1)
    assert (used[largest > 0] == 127).all(), "the whole range is used"
    assert (scales[largest == 0] == 1).all() and (used[largest == 0] == 0).all()


@settings(max_examples=50, deadline=None)
@given(WEIGHTS)
def test_codes_are_odd_and_do_not_know_a_zeros_sign(weight):
    codes, scales = quantize_per_channel(torch.from_numpy(weight))
    mirrored, same = quantize_per_channel(torch.from_numpy(-weight))
    assert torch.equal(mirrored, -codes) and torch.equal(same, scales)


def test_codes_round_half_to_even_in_every_slice():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]).repeat(8193, 1)
    codes, _ = quantize_per_channel(weight)
    assert torch.equal(codes, torch.tensor([[127, 0, 2, 2, 0, -2]], dtype=torch.int8).repeat(8193, 1))


def test_each_float_matrix_became_its_codes(both):
    traced, quantized = both
    counts = op_counts(quantized.exported)
    assert (counts["mobile.linear_int8"], counts["mobile.embedding_int8"]) == (15, 1)
    assert not {"aten.linear", "aten.embedding"} & counts.keys()
    assert quantized.passes == ("trace", "quantize") and quantized.dims == traced.dims
    state = quantized.exported.state_dict
    expected = {}
    for name, weight in float_weights(traced).items():
        base = name.replace(".", "_").removesuffix("_weight")
        expected[f"{base}_codes"], expected[f"{base}_scales"] = quantize_per_channel(weight)
    found = {name: tensor for name, tensor in state.items() if name.endswith(("_codes", "_scales"))}
    tied = {name for name in expected if name.startswith("backbone_embed_tokens")} - found.keys()
    assert found.keys() == expected.keys() - tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
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
        assert torch.equal(state[names[0]], codes) and torch.equal(state[names[1]], scales)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(reference.open(traced).logits(TOKENS, 0) - expected).max() <= 1e-4


def test_it_says_nearly_what_the_traced_program_says(both):
    before, after = (reference.open(program).logits(TOKENS, 0) for program in both)
    totals = [np.logaddexp.reduce(logits.astype(np.float64), axis=1) for logits in (before, after)]
    kl = kl_divergence(before, totals[0], after, totals[1])
    assert 1e-6 < kl.mean() < 0.02, "codes differ from weights, a little"
    chunked = reference.open(both[1])
    parts = [chunked.logits(TOKENS[at : at + 9], at) for at in range(0, 64, 9)]
    assert np.abs(np.concatenate(parts) - after).max() <= 1e-4


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
