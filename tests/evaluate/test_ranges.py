"""The report of fp16's range."""

import math

import numpy as np
import pytest

from mobile_export.evaluate.mil import Evaluator
from mobile_export.evaluate.ranges import LIMIT, Ranges
from mobile_export.mlpackage import open_package


@pytest.fixture
def ranges(build):
    """Of one run of a program in an arithmetic."""
    import coremltools as ct

    def run(body, arrays, arithmetic):
        path = build(body, arrays, precision=ct.precision.FLOAT16)
        evaluator = Evaluator(open_package(path), arithmetic)
        found = Ranges()
        given = {f"in_{index}": array for index, array in enumerate(arrays)}
        out = evaluator.run("main", given, evaluator.make_state(), tap=found)
        return found, next(iter(out.values()))

    return run


def squares(x):
    from coremltools.converters.mil import Builder as mb

    y = mb.mul(x=x, y=x, name="model_layers_7_norm_square")
    return mb.reduce_mean(x=y, axes=[-1], name="model_layers_7_norm_mean")


BIG = np.float16([[1, 2000]])


def test_an_overflow_is_infinite_in_fp16_only(ranges):
    found, out = ranges(squares, [BIG], "fp16")
    assert np.isinf(out)
    assert found.overflowing() == [("mul", "model_layers_7_norm_square", 7, "main", math.inf, math.inf)]

    found, out = ranges(squares, [BIG], "fp32")
    assert out == (1 + 4e6) / 2
    square, mean = found.overflowing()
    assert square == ("mul", "model_layers_7_norm_square", 7, "main", 4e6, 4e6 / LIMIT)
    assert mean.largest == (1 + 4e6) / 2


def test_the_worst_come_first(ranges):
    from coremltools.converters.mil import Builder as mb

    def body(x):
        parts = mb.split(x=mb.mul(x=x, y=np.float16(-2), name="twice"), num_splits=2, axis=1, name="halves")
        return mb.add(x=parts[0], y=np.float16(1000), name="more")

    found, _ = ranges(body, [np.float16([[3, 400]])], "fp16")
    names = [(one.name, one.largest, one.layer) for one in found.worst(9)]
    assert names == [("more", 994, None), ("twice", 800, None), ("halves", 800, None)]
    assert [one.name for one in found.worst(1)] == ["more"]
    assert found.overflowing() == []


def test_runs_add_up(build):
    import coremltools as ct

    evaluator = Evaluator(open_package(build(squares, [BIG], precision=ct.precision.FLOAT16)), "fp32")
    found = Ranges()
    for scale in (2, 5, 3):
        evaluator.run("main", {"in_0": np.float32([[scale, 0]])}, evaluator.make_state(), tap=found)
    assert found.worst(1)[0].largest == 25


def test_infinity_counts_where_it_is_made(ranges):
    """A mask of -inf is no overflow, and neither is what adds it; a cast to fp16 that ends there is."""
    from coremltools.converters.mil import Builder as mb

    def masked(x):
        low = np.full((1, 2), -np.inf, np.float16)
        mask = mb.select(cond=mb.greater(x=x, y=np.float16(2)), a=np.zeros((1, 2), np.float16), b=low)
        return mb.softmax(x=mb.add(x=x, y=mask, name="scores"))

    found, _ = ranges(masked, [np.float16([[1, 3]])], "fp16")
    assert found.overflowing() == []
    assert {one.name: one.largest for one in found.all()}["scores"] == 3

    def cast(x):
        wide = mb.mul(x=mb.cast(x=x, dtype="fp32"), y=np.float32(-1e9), name="wide")
        return mb.cast(x=wide, dtype="fp16", name="narrow")

    for arithmetic in ("fp16", "fp32"):
        found, _ = ranges(cast, [np.float16([[1, 3]])], arithmetic)
        assert [one.name for one in found.overflowing()] == ["narrow"]


def test_not_a_number_counts_as_infinite(ranges):
    from coremltools.converters.mil import Builder as mb

    found, _ = ranges(lambda x: mb.sqrt(x=x, name="root"), [np.float16([-1, 4])], "fp32")
    assert [(one.name, one.largest) for one in found.overflowing()] == [("root", math.inf)]


def test_integers_and_fp32_do_not_count(ranges):
    from coremltools.converters.mil import Builder as mb

    def body(x):
        wide = mb.mul(x=mb.cast(x=x, dtype="fp32"), y=np.float32(1e6), name="wide")
        whole = mb.cast(x=wide, dtype="int32", name="whole")
        return mb.mul(x=x, y=mb.cast(x=mb.minimum(x=whole, y=3), dtype="fp16", name="three"), name="out")

    found, _ = ranges(body, [np.float16([2])], "fp16")
    assert [one.name for one in found.all()] == ["three", "out"]
