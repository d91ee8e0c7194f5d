"""Updates in place: the states' memory stays, and nobody can tell from the results."""

import numpy as np
import pytest

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package

SIZE = 6
NEW = np.float16([[7, 8]])


def update(x, new, at=0):
    from coremltools.converters.mil import Builder as mb

    return mb.slice_update(x=x, update=new, begin=[0, at], end=[1, at + 2])


def read(state):
    from coremltools.converters.mil import Builder as mb

    return mb.read_state(input=state)


def write(state, value):
    from coremltools.converters.mil import Builder as mb

    return mb.coreml_update_state(state=state, value=value)


def a_cache(new, state):
    """Two updates in a row, as two layers of one cache do it."""
    first = write(state, update(read(state), new))
    return write(state, update(first, new, 3))


def older_value_needed(new, state):
    from coremltools.converters.mil import Builder as mb

    before = read(state)
    after = write(state, update(before, new))
    return mb.sub(x=after, y=before)


def older_view_needed(new, state):
    from coremltools.converters.mil import Builder as mb

    view = mb.reshape(x=read(state), shape=[SIZE])
    after = write(state, update(read(state), new))
    return mb.sub(x=after, y=mb.reshape(x=view, shape=[1, SIZE]))


def older_value_given(new, state):
    before = read(state)
    return before, write(state, update(before, new))


def never_written(new, state):
    return update(read(state), new)


def read_before_written(new, state):
    from coremltools.converters.mil import Builder as mb

    after = update(read(state), new)
    again = mb.mul(x=read(state), y=np.float16(1))
    write(state, after)
    return again


def overlapping(new, state):
    """The update is a part of what is updated."""
    from coremltools.converters.mil import Builder as mb

    before = update(read(state), new)
    part = mb.slice_by_index(x=before, begin=[0, 0], end=[1, 5])
    return write(state, mb.slice_update(x=before, update=part, begin=[0, 1], end=[1, SIZE]))


def of_an_input(new, state):
    """What is written to the state is a run's input."""
    from coremltools.converters.mil import Builder as mb

    wide = mb.tile(x=new, reps=[1, 3])
    return write(state, mb.identity(x=wide)), write(state, update(wide, new, 4))


def of_a_constant(new, state):
    from coremltools.converters.mil import Builder as mb

    ones = mb.identity(x=np.ones((1, SIZE), np.float16))
    seen = mb.mul(x=ones, y=np.float16(2))
    return seen, write(state, update(ones, new))


def constant_in_the_state(new, state):
    write(state, update(read(state), new))
    return write(state, np.full((1, SIZE), 5, np.float16))


PROGRAMS = [
    a_cache,
    older_value_needed,
    older_view_needed,
    older_value_given,
    never_written,
    read_before_written,
    overlapping,
    of_an_input,
    of_a_constant,
    constant_in_the_state,
]


def runs(path, count=3):
    """Outputs of some runs, and the state after each."""
    evaluator = Evaluator(open_package(path))
    state, results = evaluator.make_state(), []
    for scale in range(1, count + 1):
        outputs = evaluator.run("main", {"in_0": scale * NEW}, state)
        results.append([*outputs.values(), state["cache"].numpy().copy()])
    return evaluator, state, results


@pytest.mark.parametrize("program", PROGRAMS)
def test_nobody_can_tell(program, build, monkeypatch):
    path = build(program, [NEW], states={"cache": (1, SIZE)})
    _, _, reused = runs(path)
    monkeypatch.setattr("mobile_export.evaluate.program.plan", lambda steps, outputs: None)
    _, _, copied = runs(path)
    for ours, theirs in zip(reused, copied, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_cache_keeps_its_memory(build):
    evaluator, state, _ = runs(build(a_cache, [NEW], states={"cache": (1, SIZE)}))
    before = state["cache"].data_ptr()
    evaluator.run("main", {"in_0": NEW}, state)
    assert state["cache"].data_ptr() == before


def test_outputs_and_copies_stay(build):
    evaluator, state, _ = runs(build(a_cache, [NEW], states={"cache": (1, SIZE)}))
    (output,) = evaluator.run("main", {"in_0": NEW}, state).values()
    kept, values = state.copy(), output.copy()
    evaluator.run("main", {"in_0": 5 * NEW}, state)
    np.testing.assert_array_equal(output, values)
    np.testing.assert_array_equal(kept["cache"].numpy(), values)
