"""Run a saved Core ML program on this machine, by the documented meaning of its ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mobile_export.errors import ExportError
from mobile_export.evaluate.binding import AGAIN, Value
from mobile_export.evaluate.constants import Constant, Constants
from mobile_export.evaluate.program import Function, Site, Step, dtype, fits, prepare, settle
from mobile_export.mlpackage import Package, TensorType

if TYPE_CHECKING:
    import numpy as np
    import torch

_LOOK = "see whether the inputs are in its range"
Arithmetic = Literal["fp32", "fp16"]
Tap = Callable[[Site, Mapping[str, Any], Any], None]
"""Called with every output: where, the op's arguments, the value (a tensor, not to be kept)."""


class State:
    """Values of the states, fp32 (int32, bool), carried from run to run."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._values[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def copy(self) -> State:
        """One that later runs on this one do not change."""
        return State({name: value.clone() for name, value in self._values.items()})


class Evaluator:
    """A package's functions, prepared to run. ExportError: an op or a parameter is not covered.

    `arithmetic` `fp32`: every floating value is computed and kept in fp32, weights and constants as
    stored, widened. `fp16`: each op is computed in fp32 and its output is then rounded to the type
    that the program declares for it; what rounds past 65504 is infinite, as IEEE 754 says. State is
    kept accordingly: fp32 values, or values rounded to fp16.

    What agrees here is verified against the documented semantics of the program, not on the device:
    accumulation order and precision inside a device's kernels are not modelled.

    Weights are kept in fp32, once a package and arithmetic for all evaluators of them.

    `threads`: of torch while it runs; None leaves them as they are.
    """

    def __init__(self, package: Package, arithmetic: Arithmetic = "fp32", threads: int | None = None) -> None:
        self.arithmetic = arithmetic
        self.threads = threads
        half = arithmetic == "fp16"
        self._constants = Constants(package, half)
        self._prepared = {
            name: prepare(package, name, self._constants, half) for name in sorted(package.functions)
        }

    @property
    def functions(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(self._prepared)

    def inputs(self, function: str) -> dict[str, TensorType]:
        return dict(self._prepared[function].inputs)

    def states(self, function: str) -> dict[str, TensorType]:
        return dict(self._prepared[function].states)

    def outputs(self, function: str) -> dict[str, TensorType]:
        return dict(self._prepared[function].outputs)

    def make_state(self, function: str | None = None) -> State:
        """Zeros for the states of a function, or of all: a state is one wherever its name appears."""
        import torch

        kinds: dict[str, TensorType] = {}
        for name in [function] if function else self.functions:
            for state, kind in self.states(name).items():
                if kinds.setdefault(state, kind) != kind:
                    raise ExportError(f"two functions declare state '{state}' differently", AGAIN)
        return State({name: torch.zeros(_sizes(kind), dtype=dtype(kind)) for name, kind in kinds.items()})

    def run(
        self, function: str, inputs: Mapping[str, np.ndarray], state: State, tap: Tap | None = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name: fp32 arrays for floating ones in either arithmetic, int32, bool.

        `state` is changed in place; after an error it holds nothing of use. ValueError: inputs are not
        what the function declares. ExportError: an op cannot be computed on these values.
        """
        import torch

        prepared = self._prepared[function]
        missing = sorted(set(prepared.states).difference(state))
        if missing:
            raise ValueError(f"the state lacks {missing}: make it with make_state")
        with torch.inference_mode(), _threads(self.threads):
            values = self._given(prepared, inputs)
            for step in prepared.steps:
                self._step(step, values, state, tap)
            values.update(prepared.fixed)
            return {
                name: values[name].clone(memory_format=torch.contiguous_format).numpy()
                for name in prepared.outputs
            }

    def _step(self, step: Step, values: dict[str, Any], state: State, tap: Tap | None) -> None:
        if step.call:
            self._compute(step, values, tap)
        elif step.data is None:
            values[step.outputs[0].name] = state[step.state]
        else:
            written = self._written(step.data, values)
            state[step.state] = written.clone() if step.copied else written
        for name in step.last:
            del values[name]

    def _written(self, data: Value, values: dict[str, Any]) -> torch.Tensor:
        return self._constants.tensor(data) if isinstance(data, Constant) else values[data]

    def _compute(self, step: Step, values: dict[str, Any], tap: Tap | None) -> None:
        assert step.call is not None
        run, fixed, moving = step.call
        arguments = dict(fixed)
        try:
            for parameter, names, convert in moving:
                arguments[parameter] = convert([values[name] for name in names])
            results = run(**arguments)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise step.op.refuse(f"cannot be computed: {str(error).splitlines()[0]}", _LOOK) from error
        results = results if isinstance(results, (tuple, list)) else (results,)
        for output, result in zip(step.outputs, results, strict=True):
            value = output.settle(result)
            if not fits(output.kind, value.shape):
                declared = list(output.kind.shape)
                raise step.op.refuse(f"gives {list(value.shape)} where {declared} is declared", _LOOK)
            if tap:
                tap(output.site, arguments, value)
            values[output.name] = value

    def _given(self, prepared: Function, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        import numpy as np
        import torch

        if set(inputs) != set(prepared.inputs):
            raise ValueError(f"inputs are {sorted(inputs)}, declared are {sorted(prepared.inputs)}")
        values = {}
        for name, kind in prepared.inputs.items():
            array = np.array(inputs[name])
            if not fits(kind, array.shape):
                raise ValueError(f"input '{name}' is {list(array.shape)}, declared is {list(kind.shape)}")
            shapes = prepared.shapes.get(name)
            if shapes and not shapes.holds(array.shape):
                raise ValueError(f"input '{name}' is {list(array.shape)}, allowed is {shapes}")
            if (array.dtype.kind == "f") != kind.dtype.startswith("fp"):
                raise ValueError(f"input '{name}' is {array.dtype}, declared is {kind.dtype}")
            values[name] = settle(kind, self.arithmetic == "fp16")(torch.from_numpy(array))
        return values


def _sizes(kind: TensorType) -> list[int]:
    if None in kind.shape:
        raise ExportError("a state has a dimension of no fixed size", AGAIN)
    return [size or 0 for size in kind.shape]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's threads for a while: they are the process's, not a call's."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
