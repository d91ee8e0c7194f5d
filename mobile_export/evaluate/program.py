"""A function of a program, prepared to run: each op bound to what evaluates it, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mobile_export.evaluate.binding import AGAIN, Call, Op, Value, bind, bind_names
from mobile_export.evaluate.constants import Constant, Constants
from mobile_export.evaluate.reuse import plan
from mobile_export.evaluate.shapes import Allowed, allowed
from mobile_export.mlpackage import Package, TensorType, tensor_type

if TYPE_CHECKING:
    import torch

Settle = Callable[["torch.Tensor"], "torch.Tensor"]
_NARROW = {"int8": (8, True), "uint8": (8, False), "int16": (16, True), "uint16": (16, False)}


class Site(NamedTuple):
    """Where in a program a value is computed."""

    function: str
    op: str
    """The op's type, e.g. `linear`."""
    name: str
    """The op's own name."""
    dtype: str
    """Declared for the value: `fp16`, `fp32`, `int32`, `bool`, ..."""


class Output(NamedTuple):
    name: str
    kind: TensorType
    settle: Settle
    """Brings a result into the declared type."""
    site: Site


@dataclass
class Step:
    """One op. A state's steps have `state` and, when they write, `data`; others have `call`."""

    op: Op
    outputs: list[Output]
    call: Call | None = None
    state: str = ""
    data: Value | None = None
    copied: bool = True
    """Whether a state copies what is written to it."""
    last: list[str] = field(default_factory=list)
    """Values that no later step needs."""


class Function(NamedTuple):
    inputs: dict[str, TensorType]
    shapes: dict[str, Allowed]
    """What inputs may be, beyond their types."""
    states: dict[str, TensorType]
    outputs: dict[str, TensorType]
    steps: list[Step]
    fixed: dict[str, torch.Tensor]
    """Values of outputs that are constants."""


def prepare(package: Package, function: str, constants: Constants, half: bool) -> Function:
    """`half`: round outputs declared fp16. ExportError: an op or a parameter that is not covered."""
    block = package.block(function)
    given = {one.name: tensor_type(one.type) for one in package.functions[function].inputs}
    types = dict(given)
    known: dict[str, Constant] = {}
    steps: list[Step] = []
    for message in block.operations:
        op = Op(message, known, constants)
        for name in op.names():
            if name not in types:
                raise op.refuse(f"needs '{name}', which nothing computes", AGAIN)
        types.update(zip(op.outputs, op.kinds, strict=True))
        made = _constants(op, message, constants)
        if made is None:
            steps.append(_step(op, function, types, constants, half))
        else:
            known.update(zip(op.outputs, made, strict=True))
    outputs = {name: types[name] for name in block.outputs}
    _free(steps, {*outputs, *given})
    plan(steps, outputs)
    return Function(
        inputs={name: kind for name, kind in given.items() if not kind.state},
        shapes=allowed(package, function),
        states={name: kind for name, kind in given.items() if kind.state},
        outputs=outputs,
        steps=steps,
        fixed={name: constants.tensor(known[name]) for name in outputs if name in known},
    )


def fits(kind: TensorType, shape: tuple[int, ...]) -> bool:
    """Whether a shape is the declared one, where that is known before a run."""
    if len(kind.shape) != len(shape):
        return None in kind.shape
    return all(want is None or want == size for want, size in zip(kind.shape, shape, strict=True))


def dtype(kind: TensorType) -> torch.dtype:
    """Of the tensors that hold values of a declared type: fp32, bool or int32."""
    import torch

    if kind.dtype.startswith("fp"):
        return torch.float32
    return torch.bool if kind.dtype == "bool" else torch.int32


def settle(kind: TensorType, half: bool) -> Settle:
    """Into the tensor type of `dtype`; rounded to fp16 when `half` and so declared; integers wrap."""
    target = dtype(kind)
    if half and kind.dtype == "fp16":
        import torch

        return lambda value: value.to(torch.float16).to(torch.float32)
    if kind.dtype not in _NARROW:
        return lambda value: value.to(target)
    bits, signed = _NARROW[kind.dtype]
    low = -(1 << bits - 1) if signed else 0
    return lambda value: ((value.to(target) - low) & ((1 << bits) - 1)) + low


def _constants(op: Op, message: Any, constants: Constants) -> list[Constant] | None:
    """Outputs of an op that is computed before the program runs; None for any other."""
    from mobile_export.evaluate.ops_constexpr import CONSTEXPR

    if op.type == "const":
        return [constants.stored(message.attributes["val"])]
    if op.type not in CONSTEXPR:
        return None
    bind_names(op, CONSTEXPR[op.type])
    arguments = {name: values[0] for name, values in op.arguments.items()}
    if not all(isinstance(one, Constant) for one in arguments.values()):
        raise op.refuse("has a parameter that is not constant")

    def run(**arrays: Any) -> Any:
        try:
            return CONSTEXPR[op.type](**arrays)
        except (ValueError, IndexError, TypeError) as error:
            raise op.refuse(f"cannot be computed: {error}", AGAIN) from error

    return constants.computed(op.type, run, arguments, op.kinds)  # type: ignore[arg-type]


def _step(op: Op, function: str, types: Mapping[str, TensorType], constants: Constants, half: bool) -> Step:
    from mobile_export.evaluate.ops import MOVES, OPS

    rounded = half and op.type not in MOVES
    outputs = [
        Output(name, kind, settle(kind, rounded), Site(function, op.type, op.name, kind.dtype))
        for name, kind in zip(op.outputs, op.kinds, strict=True)
    ]
    if op.type in ("read_state", "write_state"):
        (state,) = op.arguments["input"]
        (data,) = op.arguments.get("data", [None])
        if not isinstance(state, str) or (op.type == "write_state") != (data is not None):
            raise op.refuse("is not of a state", AGAIN)
        return Step(op, outputs, state=state, data=data)
    if op.type not in OPS:
        raise op.refuse("is not one that we evaluate")
    return Step(op, outputs, call=bind(op, OPS[op.type], types, constants))


def _free(steps: list[Step], kept: set[str]) -> None:
    """Mark each value at the last step that needs it, or at its own when none does."""
    seen = set(kept)
    for step in reversed(steps):
        used = set(step.op.names())
        step.last = sorted((used | {one.name for one in step.outputs}) - seen)
        seen |= used
