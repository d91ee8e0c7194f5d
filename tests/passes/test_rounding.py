"""Rounding: what codes are, and that compensated ones lose less of the output."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mobile_export.passes import rounding
from mobile_export.passes.rounding import (
    blocks,
    compensated,
    factor,
    quantize_per_channel,
    quantize_per_group,
)

WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1e-30]),
)


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


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.sampled_from([1, 2, 4]))
def test_each_group_has_a_scale_of_its_own(weight, size):
    weight = torch.from_numpy(np.repeat(weight, size, axis=1))
    weight[:, ::size] *= 0.9
    codes, scales = quantize_per_group(weight, size)
    assert codes.dtype == torch.int8 and scales.shape == (len(weight), weight.shape[1] // size)
    assert codes.min() >= -8 and codes.max() <= 7
    assert torch.isfinite(scales).all() and (scales != 0).all()
    groups = weight.unflatten(1, (-1, size))
    lost = (codes.unflatten(1, (-1, size)) * scales[..., None] - groups).double().square().sum(2)
    steps = groups.abs().amax(2).double() / 8  # what a scale that reaches the largest weight may lose
    assert (lost <= size * steps.square() * 1.001).all()
    assert (codes.unflatten(1, (-1, size))[groups.abs().amax(2) == 0] == 0).all()


def test_a_scale_is_cut_where_that_loses_less():
    weight = torch.tensor([[-8.0] + [0.5] * 31, [8.0] + [2.0] * 31])
    codes, scales = quantize_per_group(weight, 32)
    assert codes[0, 0] == -8 and 0 < scales[0, 0] < 1, "one weight gives way to 31"
    assert codes[1, 0] == -8 and scales[1, 0] == -1 and (codes[1, 1:] == -2).all()


@pytest.fixture
def layer():
    """Weights [N, K], and inputs of the strongly correlated kind that layers have."""
    seeded = torch.Generator().manual_seed(4)
    weight = torch.randn(40, 96, generator=seeded)
    inputs = torch.randn(600, 12, generator=seeded) @ torch.randn(12, 96, generator=seeded)
    return weight, inputs + 0.3 * torch.randn(600, 96, generator=seeded)


def loss(weight, made, inputs):
    codes, scales = made
    return float(((weight - codes * scales[:, None]) @ inputs.T).square().mean())


def factors(inputs, damping=0.1):
    return [factor(inputs[:, part].T @ inputs[:, part], damping) for part in blocks(inputs.shape[1])]


def test_compensated_codes_lose_less_of_the_output(layer):
    weight, inputs = layer
    made = compensated(weight, factors(inputs[:400]))
    codes, scales = made
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127
    nearest = quantize_per_channel(weight)
    assert torch.equal(scales, nearest[1])
    assert loss(weight, made, inputs[400:]) < 0.4 * loss(weight, nearest, inputs[400:])


def test_compensated_codes_of_groups_lose_less_too(layer):
    weight, inputs = layer
    made, nearest = compensated(weight, factors(inputs[:400]), 16), quantize_per_group(weight, 16)
    assert made[0].min() >= -8 and made[0].max() <= 7 and torch.equal(made[1], nearest[1])
    plain = compensated(weight, [None], 16)
    assert all(torch.equal(*pair) for pair in zip(plain, nearest, strict=True))
    losses = [
        loss(weight, (codes, torch.ones(len(weight))), inputs[400:])
        for codes in (codes * scales.repeat_interleave(16, 1) for codes, scales in (made, nearest))
    ]
    assert losses[0] < 0.4 * losses[1]


def test_each_code_is_the_best_that_the_ones_before_it_leave(layer):
    """Against the plain form of GPTQ: the inverse matrix, one column after another."""
    weight, inputs = layer
    weight = weight.double()
    moments = (inputs.T @ inputs).double()
    codes, scales = compensated(weight.float(), [factor(moments.float(), 0.1)])
    order = moments.float().diagonal().argsort(descending=True, stable=True)
    damped = moments[order][:, order]
    damped += 0.1 * damped.diagonal().mean() * torch.eye(len(damped))
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left = weight[:, order] / scales[:, None].double()
    expected = torch.empty_like(left)
    for column in range(left.shape[1]):
        expected[:, column] = left[:, column].round().clamp(-127, 127)
        error = (left[:, column] - expected[:, column]) / inverse[column, column]
        left[:, column:] -= error[:, None] * inverse[column, column:]
    assert (codes[:, order] == expected).double().mean() > 0.995  # fp32 against fp64: a few ties


@given(WEIGHTS, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_compensated_codes_stay_in_bounds(weight, seed):
    weight = torch.from_numpy(weight)
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    codes, scales = compensated(weight, factors(inputs, damping=0.01))
    assert codes.min() >= -127 and codes.shape == weight.shape
    assert torch.isfinite(scales).all() and (scales > 0).all()


def test_blocks_of_columns_and_slices_of_rows(layer, monkeypatch):
    weight, inputs = layer
    whole = compensated(weight, factors(inputs))
    monkeypatch.setattr(rounding, "_ROWS", 7)
    assert torch.equal(compensated(weight, factors(inputs))[0], whole[0])
    monkeypatch.setattr(rounding, "_PANEL", 5)
    assert (compensated(weight, factors(inputs))[0] == whole[0]).float().mean() > 0.999
    monkeypatch.setattr(rounding, "BLOCK", 40)
    assert [part.stop - part.start for part in blocks(96)] == [32, 32, 32]
    assert [part.stop - part.start for part in blocks(95)] == [32, 32, 31]
    made = compensated(weight, factors(inputs))
    nearest = loss(weight, quantize_per_channel(weight), inputs)
    assert loss(weight, whole, inputs) < loss(weight, made, inputs) < nearest


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_inputs_that_tell_nothing_leave_the_nearest_codes(layer, value):
    weight, _ = layer
    made = compensated(weight, [factor(torch.full((96, 96), value), 0.1)])
    assert torch.equal(made[0], quantize_per_channel(weight)[0])


def test_uncorrelated_inputs_of_one_power_leave_the_nearest_codes(layer):
    weight, _ = layer
    made = compensated(weight, [factor(torch.eye(96), 0.1)])
    assert torch.equal(made[0], quantize_per_channel(weight)[0])
