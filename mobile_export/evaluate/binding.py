"""From an op of the program to a call: its arguments, as the function that evaluates it declares them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mobile_export.errors import ExportError
from mobile_export.evaluate.constants import Constant, Constants
from mobile_export.mlpackage import TensorType, tensor_type

if TYPE_CHECKING:
    import torch

AGAIN = "export the package again"
Convert = Callable[[list[Any]], Any]


class Moving(NamedTuple):
    """A parameter whose value is known only when the program runs."""

    parameter: str
    names: list[str]
    convert: Convert


class Call(NamedTuple):
    """`run` with its constant arguments, and what to look up for the others."""

    run: Callable[..., Any]
    fixed: dict[str, Any]
    moving: list[Moving]


Value = Constant | str
"""Of an argument: a constant, or the name of a value computed at run time."""


class Op:
    """One Operation message: its type, name, arguments and the types of its outputs."""

    def __init__(self, message: Any, known: Mapping[str, Constant], constants: Constants) -> None:
        self.type: str = message.type
        self.outputs: list[str] = [one.name for one in message.outputs]
        self.kinds: list[TensorType] = [tensor_type(one.type) for one in message.outputs]
        named = "name" in message.attributes
        name = message.attributes["name"].immediateValue.tensor.strings.values if named else ()
        self.name: str = name[0] if name else (self.outputs or [self.type])[0]
        self.arguments: dict[str, list[Value]] = {
            key: [constants.stored(value)]
            for key, value in message.attributes.items()
            if key != "name" and not (self.type == "const" and key == "val")
        }
        for key, argument in message.inputs.items():
            self.arguments[key] = [
                known.get(one.name, one.name)
                if one.WhichOneof("binding") == "name"
                else constants.stored(one.value)
                for one in argument.arguments
            ]

    def names(self) -> list[str]:
        """Values computed at run time, and states, that it needs."""
        return [one for values in self.arguments.values() for one in values if isinstance(one, str)]

    def refuse(self, why: str, hint: str = "write it with the ops of evaluate/ops.py") -> ExportError:
        """An error that names this op."""
        return ExportError(f"op '{self.type}' ('{self.name}') {why}", hint)


def bind(op: Op, run: Callable[..., Any], types: Mapping[str, TensorType], constants: Constants) -> Call:
    """Match the op's arguments with the parameters of `run`. ExportError: one is unknown or missing."""
    parameters, hints = _signature(run)
    bind_names(op, run)
    call = Call(run, {}, [])
    for name, parameter in parameters.items():
        values = op.arguments.get(name)
        if values is None:
            if name == "epsilon" and op.type in ("inverse", "log", "rsqrt"):
                call.fixed[name] = _as_stored(parameter.default, op, types)
        elif all(isinstance(one, Constant) for one in values):
            try:
                call.fixed[name] = _constant(op, name, hints[name], values, constants)
            except (ValueError, IndexError):
                raise op.refuse(f"has a parameter '{name}' of a size that is not its", AGAIN) from None
        elif hints[name] is str or get_origin(hints[name]) is Literal:
            raise op.refuse(f"has a parameter '{name}' that is not constant")
        else:
            kept = [constants.tensor(one) if isinstance(one, Constant) else one for one in values]
            call.moving.append(_moving(name, kept, hints[name]))
    return call


def bind_names(op: Op, run: Callable[..., Any]) -> None:
    """ExportError: the op has a parameter that `run` does not know, or lacks one that it needs."""
    parameters, _ = _signature(run)
    unknown = sorted(set(op.arguments) - set(parameters))
    if unknown:
        raise op.refuse(f"has a parameter '{unknown[0]}' that we do not evaluate")
    needed = {name for name, one in parameters.items() if one.default is inspect.Parameter.empty}
    missing = sorted(needed - set(op.arguments))
    if missing:
        raise op.refuse(f"lacks its parameter '{missing[0]}'", AGAIN)


@cache
def _signature(run: Callable[..., Any]) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Parameters of a function and their types, without `| None`."""
    hints = {}
    for name, hint in get_type_hints(run).items():
        kinds = [one for one in get_args(hint) if one is not NoneType]
        optional = get_origin(hint) in (Union, UnionType)
        hints[name] = kinds[0] if optional and len(kinds) == 1 else hint
    return inspect.signature(run).parameters, hints


def _constant(op: Op, name: str, hint: Any, values: list[Any], constants: Constants) -> Any:
    import torch

    if hint is torch.Tensor:
        return constants.tensor(values[0])
    if hint == list[torch.Tensor]:
        return [constants.tensor(one) for one in values]
    arrays = [constants.array(one) for one in values]
    if hint is str or get_origin(hint) is Literal:
        allowed = get_args(hint)
        if allowed and arrays[0] not in allowed:
            raise op.refuse(f"has '{arrays[0]}' as its '{name}', which we do not evaluate")
        return arrays[0]
    return _plain([item for array in arrays for item in array.reshape(-1).tolist()], hint)


def _moving(name: str, values: list[Any], hint: Any) -> Moving:
    """Constants among the values are kept in the conversion, the others are looked up by name."""
    import torch

    names = [one for one in values if isinstance(one, str)]
    if hint is torch.Tensor:
        return Moving(name, names, lambda found: found[0])

    def merge(found: list[torch.Tensor]) -> list[torch.Tensor]:
        rest = iter(found)
        return [next(rest) if isinstance(one, str) else one for one in values]

    if hint == list[torch.Tensor]:
        return Moving(name, names, merge)
    return Moving(
        name,
        names,
        lambda found: _plain([item for one in merge(found) for item in one.reshape(-1).tolist()], hint),
    )


def _plain(items: list[Any], hint: Any) -> Any:
    if get_origin(hint) is list:
        return items
    (item,) = items
    return item


def _as_stored(default: float, op: Op, types: Mapping[str, TensorType]) -> float:
    """coremltools stores a default epsilon in x's type: 1e-12 is 0 in fp16."""
    import numpy as np

    (x,) = op.arguments.get("x", [""])
    kind = x.kind if isinstance(x, Constant) else types.get(x)
    return float(np.float16(default)) if kind and kind.dtype == "fp16" else default
