"""An MLP in parts: the same arithmetic, and a range of its own for each."""

import numpy as np
import pytest
import torch

from mobile_export import dialect
from mobile_export.recipe import ExecuTorch
from mobile_export.rewrite import editable, tensor_of
from mobile_export.targets import executorch, reference
from mobile_export.targets.executorch_mlp import split_mlps
from mobile_export.types import sample_inputs

assert dialect.rotary is not None  # importing it registered the operators
LINEAR = torch.ops.mobile.linear_int8.default
TOKENS = [3 + 37 * index % 1000 for index in range(64)]


@pytest.fixture(scope="module")
def quantized(programs_of, spec):
    return programs_of(spec())[2]


def split(program, parts):
    module = editable(program.exported)
    split_mlps(module, parts)
    module.recompile()
    return module


def linears(module):
    return module.graph.find_nodes(op="call_function", target=LINEAR)


@pytest.mark.parametrize("parts", [2, 4, 192])
def test_it_says_the_same_of_the_same_codes(quantized, parts):
    module = split(quantized, parts)
    assert len(linears(module)) == 2 * (4 + 3 * parts) + 1
    _, start, caches = sample_inputs(quantized.dims)[0]
    with torch.no_grad():
        logits = module(torch.tensor([TOKENS]), start, caches)[0][0].numpy()
    assert np.abs(logits - reference.open(quantized).logits(TOKENS, 0)).max() < 1e-4
    found = {}
    for node in linears(module):
        found.setdefault(str(node.args[1].target).rsplit("_codes")[0], []).append(
            tensor_of(module, node.args[1])
        )
    for base, codes in found.items():
        if "mlp" in base:
            whole = quantized.exported.state_dict[f"{base}_codes"]
            assert torch.equal(torch.cat(codes, dim=1 if "down" in base else 0), whole)


@pytest.mark.parametrize("parts", [1, 5])
def test_a_width_that_parts_do_not_divide_stays_whole(quantized, parts):
    assert len(linears(split(quantized, parts))) == 15


def test_a_far_column_costs_less_in_the_real_runtime(quantized, tmp_path):
    """One neuron of each MLP is made to speak a hundred times as loud, and to be heard as before."""
    import copy
    from dataclasses import replace

    exported = copy.copy(quantized.exported)
    state = {name: copy.deepcopy(tensor) for name, tensor in exported.state_dict.items()}
    for layer in (0, 1):
        state[f"backbone_layers_{layer}_mlp_up_proj_scales"][7] *= 100
        state[f"backbone_layers_{layer}_mlp_down_proj_codes"][:, 7] = 1
    exported._state_dict = state
    far = replace(quantized, exported=exported)
    expected = reference.open(far).logits(TOKENS, 0)
    errors = []
    for parts in (1, 4):
        out = tmp_path / f"{parts}.pte"
        executorch.lower(far, ExecuTorch(mlp_parts=parts), {"get_eos_ids": [5]}, out)
        said = executorch.open(out).logits(TOKENS, 0)
        errors.append(float(np.square(said - expected).mean()))
    assert errors[1] < errors[0] / 2, errors
