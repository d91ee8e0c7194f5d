"""One op, its inputs and what it must give; each is run from a saved package of that op alone."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

RANDOM = np.random.default_rng(0)


@dataclass
class Case:
    """`mb.<op>(**inputs, **parameters)`; an array of bool becomes int32, cast in the program."""

    op: str
    inputs: dict[str, np.ndarray]
    expected: Any
    """Of the inputs, in order, as fp32, int32 or bool arrays: an array, or several."""
    parameters: dict[str, Any] = field(default_factory=dict)
    tag: str = ""
    inferred: bool = True
    """Whether coremltools' inference may be asked: it is wrong, or fails, on the others."""

    def __str__(self):
        return f"{self.op}-{self.tag}" if self.tag else self.op


def real(*shape, low=-3.0, high=3.0):
    return RANDOM.uniform(low, high, shape).astype(np.float32)


def whole(*shape, low=-5, high=6):
    return RANDOM.integers(low, high, shape).astype(np.int32)


def bits(*shape):
    return RANDOM.random(shape) < 0.5


def torched(function):
    return lambda *arrays: [np.asarray(one) for one in many(function(*map(torch.from_numpy, arrays)))]


def many(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def unary(op, expected, low=-3.0, high=3.0, **kinds):
    return Case(op, {"x": real(2, 3, 4, low=low, high=high)}, expected, **kinds)


def binary(op, expected, **kinds):
    x, y = real(2, 1, 4), real(3, 1, low=0.5)
    return Case(op, {"x": x, "y": y}, expected, **kinds)


def flat(case):
    """(parameter, array) of every input; a tuple of arrays is one parameter."""
    groups = {name: value if isinstance(value, tuple) else (value,) for name, value in case.inputs.items()}
    return [(name, one) for name, group in groups.items() for one in group]


def call(case, values):
    """The op on values of the program being built; results of bool as int32."""
    from coremltools.converters.mil import Builder as mb

    arguments = dict(case.parameters)
    for (name, array), value in zip(flat(case), values, strict=True):
        value = mb.cast(x=value, dtype="bool") if array.dtype == bool else value
        value = mb.squeeze(x=value) if array.ndim == 0 else value
        if isinstance(case.inputs[name], tuple):
            arguments.setdefault(name, []).append(value)
        else:
            arguments[name] = value
    return [whole_numbers(one) for one in many(getattr(mb, case.op)(**arguments))]


def whole_numbers(value):
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    return mb.cast(x=value, dtype="int32") if value.dtype == types.bool else value


def check(case, evaluate):
    """The saved op gives what is expected."""
    arrays = [array for _, array in flat(case)]
    given = [array.astype(np.int32) if array.dtype == bool else array for array in arrays]
    given = [array.reshape(1) if array.ndim == 0 else array for array in given]
    compare(evaluate(lambda *values: call(case, values), given), case.expected(*arrays))


def check_inference(case):
    """coremltools, asked for the op's value on constants, expects the same."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=ct.target.iOS18):
        found = many(call(case, [mb.const(val=np.atleast_1d(array)) for _, array in flat(case)]))
    assert all(one.val is not None for one in found)
    compare([np.asarray(one.val) for one in found], case.expected(*(array for _, array in flat(case))))


def compare(found, expected):
    for ours, theirs in zip(found, many(expected), strict=True):
        theirs = np.asarray(theirs)
        assert ours.shape == theirs.shape
        assert (ours.dtype.kind == "f") == (theirs.dtype.kind == "f")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
