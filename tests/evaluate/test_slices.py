"""Slices of every kind against numpy."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mobile_export.evaluate.ops_shape import slice_by_index, slice_update


@st.composite
def slices(draw):
    """(array, parameters, what numpy is asked with, dimensions that an index removes)."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parameters = {name: [] for name in ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")}
    index, removed = [], []
    for axis, size in enumerate(shape):
        begin, end = (draw(st.integers(-size - 2, size + 2)) for _ in range(2))
        stride = draw(st.sampled_from([-3, -2, -1, 1, 2, 3]))
        from_start, to_end, squeeze = (draw(st.booleans()) for _ in range(3))
        if squeeze:
            place = 0 if from_start else begin
            assume(-size <= place < size)
            index.append(slice(place, place + 1 or None))
            removed.append(axis)
        else:
            index.append(slice(None if from_start else begin, None if to_end else end, stride))
        for name, value in zip(parameters, (begin, end, stride, from_start, to_end, squeeze), strict=True):
            parameters[name].append(value)
    return array, parameters, tuple(index), tuple(removed)


@given(slices())
def test_slice_by_index(drawn):
    array, parameters, index, removed = drawn
    found = slice_by_index(torch.from_numpy(array), **parameters)
    np.testing.assert_array_equal(found.numpy(), array[index].squeeze(removed))


@given(slices())
def test_slice_update(drawn):
    array, parameters, index, removed = drawn
    update = -1 - np.arange(array[index].size, dtype=np.float32).reshape(array[index].shape)
    x = torch.from_numpy(array.copy())
    found = slice_update(x, torch.from_numpy(update.squeeze(removed)), **parameters)
    expected = array.copy()
    expected[index] = update
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(x.numpy(), array, "the source itself is not written")
