"""Rotate: the program says the same in another basis, and what its runtime rounds is smaller."""

import copy
from dataclasses import replace
from functools import cache

import msgspec
import numpy as np
import pytest
import torch

from mobile_export import passes, programs
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.parity import kl_divergence
from mobile_export.passes import rotate
from mobile_export.passes.quantize import Quantize
from mobile_export.passes.rotate import Rotate, Rotation
from mobile_export.passes.trace import op_counts
from mobile_export.recipe import load_recipe
from mobile_export.rewrite import editable, reexport
from mobile_export.targets import reference
from mobile_export.types import Program

TOKENS = [3 + 37 * index % 1000 for index in range(64)]
SANDBOX = "sandbox:{}?layers=2&hidden=64&vocab=1024"
ODD = "sandbox:{}?layers=2&hidden=84&heads=6&kv_heads=3&head_dim=14&intermediate=100&vocab=1024"
"""Width 4 x 21, heads of 2 x 7."""
MODELS = [
    SANDBOX.format("qwen2"),
    SANDBOX.format("llama") + "&tied=0",
    ODD.format("qwen2") + "&tied=0",
    ODD.format("qwen3"),
    ODD.format("llama"),
]


OFF = load_recipe("sandbox", context=64)
ON = msgspec.structs.replace(OFF, quantize=msgspec.structs.replace(OFF.quantize, rotate=True))


def kl_of(before, after, tokens=TOKENS):
    said = [reference.open(program).logits(tokens, 0) for program in (before, after)]
    totals = [np.logaddexp.reduce(logits.astype(np.float64), axis=1) for logits in said]
    return kl_divergence(said[0], totals[0], said[1], totals[1]).mean()


@pytest.fixture(scope="module")
def traced_of():
    """The traced program of a model's name."""

    @cache
    def run(name):
        return passes.run(resolve(name), OFF, last="trace").program

    return run


@pytest.fixture
def small(traced_of):
    return traced_of(MODELS[0])


@pytest.fixture(scope="module", params=MODELS)
def both(request, traced_of):
    traced = traced_of(request.param)
    return traced, Rotate().run(traced, ON)


def weights_of(program):
    return {name: tensor for name, tensor in program.exported.state_dict.items() if tensor.dim() == 2}


def altered(program, change):
    """The program with `change` done to a copy of its weights."""
    state = {name: tensor.detach().clone() for name, tensor in program.exported.state_dict.items()}
    change(state)
    exported = copy.copy(program.exported)
    exported._state_dict = {
        name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()
    }
    return replace(program, exported=exported)


@pytest.mark.parametrize("size", [1, 2, 6, 7, 64, 84, 896])
def test_a_draw_is_orthogonal_and_known_by_its_seed(size):
    one, again, other = (Rotation.draw(size, *seed) for seed in ((3, 1), (3, 1), (3, 2)))
    matrix = one.columns(torch.eye(size))
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, again.columns(torch.eye(size)))
    assert size < 6 or not torch.allclose(matrix, other.columns(torch.eye(size)))


def test_an_outlier_is_spread_over_all_columns():
    spike = torch.zeros(1, 896)
    spike[0, 5] = 1000.0
    assert 50 < Rotation.draw(896, 0).columns(spike).abs().max() < 80


def test_it_says_the_same(both):
    traced, rotated = both
    assert rotated.passes == ("trace", "rotate") and rotated.dims == traced.dims
    assert kl_of(traced, rotated) < 1e-8
    after = reference.open(rotated)
    parts = np.concatenate([after.logits(TOKENS[at : at + 9], at) for at in range(0, 64, 9)])
    assert np.abs(parts - reference.open(rotated).logits(TOKENS, 0)).max() <= 1e-4


def test_every_matrix_is_another_and_the_stream_norms_are_ones(both):
    traced, rotated = both
    before, after = traced.exported.state_dict, rotated.exported.state_dict
    for name, tensor in before.items():
        if tensor.dim() == 2 and name in after:
            assert after[name].dtype == torch.float32 and not torch.allclose(after[name], tensor), name
        elif "layernorm" in name:
            assert torch.equal(after[name], torch.ones_like(tensor)), name
        elif name == "backbone.norm.weight":
            level = float(tensor.mean()) if rotate.MIX in after else 1.0
            torch.testing.assert_close(after[name], torch.full_like(tensor, level))
        elif name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")):
            assert torch.equal(after[name], tensor), name
        elif name.endswith("v_proj.bias"):
            assert not torch.allclose(after[name], tensor)


def test_a_tied_head_stays_tied(both):
    traced, rotated = both
    tied = len({tensor.data_ptr() for tensor in weights_of(traced).values()}) < 16
    tables = [
        tensor
        for tensor in weights_of(rotated).values()
        if tuple(tensor.shape) == (traced.dims.vocab, traced.dims.hidden)
    ]
    assert len({tensor.data_ptr() for tensor in tables}) == (1 if tied else 2)
    linears = op_counts(rotated.exported)["aten.linear"] - op_counts(traced.exported)["aten.linear"]
    assert linears == (1 if tied else 0)
    quantized = Quantize().run(replace(rotated, source=traced.source), ON)
    Quantize().check(quantized, ON)
    codes = [tensor for name, tensor in quantized.exported.state_dict.items() if name.endswith("_codes")]
    assert len(codes) == 16
    assert not tied or mix_lost(rotated, quantized) < 1e-4
    assert kl_of(rotated, quantized) < 0.02


def mix_lost(rotated, quantized):
    """Share of the matrix's power that its codes lose."""
    state, whole = quantized.exported.state_dict, rotated.exported.state_dict[rotate.MIX]
    made = state["final_mix_codes"] * state["final_mix_scales"][:, None]
    return float((made - whole).square().sum() / whole.square().sum())


def test_a_planted_outlier_leaves_the_residual_stream(traced_of):
    """As trained models have them: one column that every token drives far out."""

    def plant(state):
        for name, tensor in state.items():
            if name.endswith("embed_tokens.weight"):
                tensor[:, 5] = 200.0
            if name.endswith("down_proj.weight"):
                tensor[5] *= 20.0

    traced = altered(traced_of(MODELS[1]), plant)
    rotated = Rotate().run(traced, ON)
    assert kl_of(traced, rotated) < 1e-8
    before, after = (largest_residual(program) for program in (traced, rotated))
    assert before > 200 and after < before / 3


def largest_residual(program):
    """Largest |x| that a norm of the residual stream reads."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target == torch.ops.mobile.rms_norm.default:
                found.append(float(self.fetch_args_kwargs_from_env(n)[0][0].abs().max()))
            return super().run_node(n)

    inputs = (torch.tensor([TOKENS]), torch.zeros(1, dtype=torch.int64), reference.open(program).caches)
    with torch.no_grad():
        Watch(editable(program.exported)).run(*inputs)
    return max(found)


def test_the_same_bytes_each_time_and_with_one_thread(small, tmp_path):
    traced, threads = small, torch.get_num_threads()
    written = []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            folder = tmp_path / str(len(written))
            folder.mkdir()
            programs.save(Rotate().run(traced, ON), folder)
            written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1]


def test_what_is_off_changes_nothing(small):
    traced = small
    off = Rotate().run(traced, OFF)
    assert off.exported is traced.exported and off.passes == ("trace", "rotate")


@pytest.mark.parametrize("step", ["rotate_stream", "rotate_values"])
def test_a_basis_that_is_not_orthogonal_is_seen(small, monkeypatch, step):
    """The measure that says 'the same' would say otherwise."""
    traced, right = small, Rotation.columns

    def wrong(self, weight):
        return right(self, weight) * torch.linspace(0.8, 1.2, weight.shape[1])

    monkeypatch.setattr(
        rotate, "rotate_values" if step == "rotate_stream" else "rotate_stream", lambda *_: None
    )
    assert kl_of(traced, Rotate().run(traced, ON)) < 1e-8
    monkeypatch.setattr(Rotation, "columns", wrong)
    assert kl_of(traced, Rotate().run(traced, ON)) > 1e-4


def test_a_program_of_another_structure_is_refused(small):
    traced = small
    module = editable(traced.exported)
    (embedding,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    with module.graph.inserting_after(embedding):
        clipped = module.graph.call_function(torch.ops.aten.tanh.default, (embedding,))
    embedding.replace_all_uses_with(clipped, lambda user: user is not clipped)
    other = Program(reexport(module, traced), traced.dims, traced.passes)
    with pytest.raises(ExportError, match="residual stream goes into aten.tanh"):
        Rotate().run(other, ON)


def test_weights_that_are_not_numbers_are_refused(small):
    def put(state):
        state["backbone.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan

    broken = altered(small, put)
    with pytest.raises(ExportError, match="rotate made unusable values in '.*up_proj.weight'"):
        Rotate().check(Rotate().run(broken, ON), ON)


def test_a_column_far_above_all_others_no_longer_sets_the_steps_of_down_proj(traced_of):
    def plant(state):
        for name, tensor in state.items():
            if name.endswith("down_proj.weight"):
                tensor[:, 7] *= 30.0

    traced = altered(traced_of(MODELS[1]), plant)
    rotated = Rotate().run(traced, ON)
    assert kl_of(traced, rotated) < 1e-8
    name = "backbone.layers.1.mlp.down_proj.weight"
    before, after = (largest_over_mean(program.exported.state_dict[name]) for program in (traced, rotated))
    assert before > 15 and after == pytest.approx(before**0.5, rel=0.3)


def largest_over_mean(weight):
    """Of the columns' largest |w|."""
    largest = weight.detach().abs().amax(0)
    return float(largest.max() / largest.mean())
