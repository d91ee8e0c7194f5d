"""A program's constants: stored or computed from stored ones, each made into a tensor once a package."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from mobile_export.mlpackage import Package, TensorType, tensor_type

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Constant:
    """A value known before the program runs."""

    kind: TensorType
    key: Hashable
    """Equal for equal values: it names the bytes behind the value and how they are read."""
    load: Callable[[], Any]
    """The value: an array of the declared shape, a text or a list of texts."""


class Constants:
    """Constants of one package in one arithmetic (`mil.Evaluator`).

    Arrays and tensors are kept as long as an evaluator of the package uses them.
    """

    def __init__(self, package: Package, half: bool) -> None:
        self._package = package
        self._half = half
        self._kept: WeakValueDictionary[Hashable, Any] = package.constants.setdefault(
            "evaluate", WeakValueDictionary()
        )

    def stored(self, value: Any) -> Constant:
        """Of a Value message, in blob storage or in the program itself."""
        kind = tensor_type(value.type)
        key = self._package.blob(value) or value.SerializeToString(deterministic=True)
        return Constant(kind, (key, kind), lambda: self._package.value(value))

    def computed(
        self, op: str, run: Callable[..., Any], arguments: dict[str, Constant], kinds: list[TensorType]
    ) -> list[Constant]:
        """Outputs of a `constexpr_` op, each computed when first asked for."""
        rounded = tuple(self._half and kind.dtype == "fp16" for kind in kinds)
        key = (op, tuple(sorted((name, one.key) for name, one in arguments.items())), rounded)

        def output(index: int) -> Any:
            results = run(**{name: self.array(one) for name, one in arguments.items()})
            result = results[index] if isinstance(results, tuple) else results
            return _round(result) if rounded[index] else result

        return [
            Constant(kind, (key, index), lambda index=index: output(index))  # type: ignore[misc]
            for index, kind in enumerate(kinds)
        ]

    def array(self, constant: Constant) -> Any:
        """numpy array of a constant, or its text."""
        found = self._kept.get(constant.key)
        if found is None:
            found = constant.load()
            if hasattr(found, "__array__"):
                self._kept[constant.key] = found
        return found

    def tensor(self, constant: Constant) -> torch.Tensor:
        """Tensor of a constant: fp32, int32 or bool (int64 for types that int32 cannot hold)."""
        import torch

        key = ("tensor", constant.key)
        found = self._kept.get(key)
        if found is None:
            array = self.array(constant)
            found = self._kept[key] = torch.from_numpy(_widen(array))
        return found


def _widen(array: np.ndarray) -> np.ndarray:
    """fp32, int32, int64 or bool; memory that torch may own, never the mapped file's."""
    import numpy as np

    if array.dtype.kind == "f":
        wide: Any = np.float32
    elif array.dtype.kind == "b":
        wide = np.bool_
    else:
        wide = np.int64 if array.dtype.itemsize > 4 or array.dtype == np.uint32 else np.int32
    return np.require(array.astype(wide, copy=not array.flags.writeable), requirements="C")


def _round(array: np.ndarray) -> np.ndarray:
    """fp32 values rounded to fp16, in place, a part that fits a cache at a time."""
    import torch

    for part in torch.from_numpy(array).view(-1).split(1 << 18):
        part.copy_(part.half())
    return array
