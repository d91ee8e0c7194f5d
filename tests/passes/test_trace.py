"""Trace: the program says what the transformers model says, however its input is cut."""

import numpy as np
import pytest
import torch

from mobile_export import dialect, passes
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.passes.trace import Trace, op_counts
from mobile_export.recipe import load_recipe
from mobile_export.rewrite import editable, reexport, rotary_tables, swap
from mobile_export.targets import reference
from mobile_export.types import Program

assert dialect.rotary is not None  # importing it registered the operators
FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 1000 for index in range(64)]
ATOL = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, programs_of, spec):
    """A runner of a traced program, and fp32 [64, vocab] of the model itself."""
    checkpoint, traced, _ = programs_of(spec(request.param))
    with torch.inference_mode():
        expected = checkpoint.model()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    return reference.open(traced), expected


def fed(runner, cuts):
    """All positions' logits, the text fed from cut to cut."""
    runner.reset()
    parts = [runner.logits(TOKENS[at:end], at) for at, end in zip(cuts, cuts[1:], strict=False)]
    return np.concatenate(parts)


CUTS = {
    "one call, as long as the context": [0, 64],
    "one token": [0, 1],
    "chunks": [0, 7, 23, 24, 40, 64],
    "token by token": list(range(65)),
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_it_equals_the_model(both, cuts):
    runner, expected = both
    given = fed(runner, cuts)
    assert given.dtype == np.float32
    assert np.abs(given - expected[: cuts[-1]]).max() <= ATOL
    assert np.abs(expected).max() > 1, "logits near zero would agree with anything"


def test_it_is_made_of_our_operators(both):
    traced = both[0].program
    counts = op_counts(traced.exported)
    assert (counts["mobile.attention"], counts["mobile.update_cache"], counts["mobile.rotary"]) == (2, 4, 4)
    assert counts["mobile.rms_norm"] in (5, 9)  # qwen3 norms q and k too
    assert traced.passes == ("trace",)
    assert (traced.dims.layers, traced.dims.context, traced.dims.vocab) == (2, 64, 1024)
    left = {name for name in counts if name.startswith("aten.") and "softmax" in name or "matmul" in name}
    assert not left


def test_it_is_pure(both):
    runner = both[0]
    runner.reset()
    caches = [cache.clone() for cache in runner.caches]
    handed = list(runner.caches)
    runner.logits(TOKENS[:5], 0)
    assert all(torch.equal(old, cache) for old, cache in zip(handed, caches, strict=True))
    assert not any(torch.equal(new, cache) for new, cache in zip(runner.caches, caches, strict=True))


def test_rotary_tables_are_those_of_the_model(both):
    cos, sin = rotary_tables(both[0].program)
    dim = both[0].program.dims.head_dim
    angle = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    assert torch.allclose(cos, torch.cat((angle, angle), 1).cos(), atol=1e-5)
    assert torch.allclose(sin, torch.cat((angle, angle), 1).sin(), atol=1e-5)


def test_a_context_of_one(programs_of, spec):
    checkpoint, traced, _ = programs_of(spec(), 1)
    with torch.inference_mode():
        expected = checkpoint.model()(input_ids=torch.tensor([[9]])).logits[0].numpy()
    assert np.abs(reference.open(traced).logits([9], 0) - expected).max() <= ATOL


def test_a_traced_model_is_left_as_it_was(spec):
    from mobile_export.passes.trace import dims_of, trace

    model = resolve(spec()).model()
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        before = model(input_ids=tokens).logits
        trace(model, dims_of(model, 16))
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_a_context_past_the_models_is_refused(spec):
    recipe = load_recipe("sandbox", context=33)
    with pytest.raises(ExportError, match=r"pass 'trace' failed .*context 33 is past the model's 32; use"):
        passes.run(resolve(spec(more="&context=32")), recipe)


def broken(program, target, replacement):
    """The program with one call of an operator replaced by a call of another."""
    module = editable(program.exported)
    node = next(node for node in module.graph.nodes if node.target == target)
    swap(node, *replacement(node))
    return Program(reexport(module, program), program.dims, program.passes)


BREAKS = {
    "1 mobile::attention, not 2": (
        torch.ops.mobile.attention.default,
        lambda node: (torch.ops.aten.mul.Tensor, (node.args[0], 1.0)),
    ),
    "3 mobile::rotary, not 4": (
        torch.ops.mobile.rotary.default,
        lambda node: (torch.ops.aten.mul.Tensor, (node.args[0], 2.0)),
    ),
    "3 mobile::update_cache, not 4": (
        torch.ops.mobile.update_cache.default,
        lambda node: (torch.ops.aten.mul.Tensor, (node.args[0], 2.0)),
    ),
    "a norm was not traced": (
        torch.ops.mobile.rms_norm.default,
        lambda node: (torch.ops.aten.mul.Tensor, (node.args[0], 2.0)),
    ),
}


@pytest.mark.parametrize("says", BREAKS)
def test_the_postcondition_catches(programs_of, spec, says):
    _, traced, _ = programs_of(spec())
    Trace().check(traced, load_recipe("sandbox"))
    with pytest.raises(ExportError, match=says):
        Trace().check(broken(traced, *BREAKS[says]), load_recipe("sandbox"))
