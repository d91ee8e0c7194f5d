"""What the rules for Core ML read: the functions of a bundle's package, and how large things are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.manifest import Manifest
from mobile_export.mlpackage import Package, TensorType, open_package, tensor_type

_BITS = {"fp16": 16, "fp32": 32, "fp64": 64, "bool": 8, "string": 0}


@dataclass(frozen=True)
class Function:
    """A function of the program."""

    opset: str
    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    ops: list[Any]
    constants: dict[str, Any]
    outputs: list[str]


@dataclass(frozen=True)
class Looked:
    """What the checks read."""

    manifest: Manifest
    package: Package
    functions: dict[str, Function]
    weight_bytes: int

    @property
    def states(self) -> dict[str, TensorType]:
        """Of all functions; those of one name are one."""
        return {name: kind for one in self.functions.values() for name, kind in one.states.items()}

    @property
    def version(self) -> int:
        """The format's specification version."""
        return int(self.package.spec.specificationVersion)


def look(bundle: Bundle) -> Looked:
    """Open the bundle's `.mlpackage`. ExportError when it has none, or it is damaged."""
    names = [name for name, file in bundle.manifest.files.items() if file.role == "program"]
    folders = {
        str(parent)
        for name in names
        for parent in PurePosixPath(name).parents
        if parent.suffix == ".mlpackage"
    }
    if len(folders) != 1:
        raise ExportError(f"this bundle has {len(folders)} Core ML packages, not one", "export it again")
    folder = folders.pop()
    package = open_package(bundle.folder / folder)
    weights = sum(
        file.bytes
        for name, file in bundle.manifest.files.items()
        if name.startswith(f"{folder}/") and "weights" in PurePosixPath(name).parts
    )
    functions = {name: _function(package, name) for name in sorted(package.functions)}
    return Looked(bundle.manifest, package, functions, weights)


def _function(package: Package, name: str) -> Function:
    message, block = package.functions[name], package.block(name)
    kinds = {one.name: tensor_type(one.type) for one in message.inputs}
    ops = list(block.operations)
    return Function(
        message.opset,
        {one: kind for one, kind in kinds.items() if not kind.state},
        {one: kind for one, kind in kinds.items() if kind.state},
        ops,
        {op.outputs[0].name: op.attributes["val"] for op in ops if op.type == "const"},
        list(block.outputs),
    )


def values(function: Function) -> Iterator[tuple[Any, str, TensorType]]:
    """(op, name, type) of every tensor that an op makes."""
    for op in function.ops:
        for output in op.outputs:
            if output.type.WhichOneof("type") == "tensorType":
                yield op, output.name, tensor_type(output.type)


def size(kind: TensorType) -> int:
    """Of a tensor; a varying dimension counts as 1."""
    found = re.search(r"\d+", kind.dtype)
    bits = _BITS.get(kind.dtype, int(found.group()) if found else 0)
    return math.prod(one or 1 for one in kind.shape) * bits // 8


def need(looked: Looked) -> tuple[int, int, int]:
    """Bytes of weights, of states, and of the largest op's results and arguments together."""
    largest = 0
    for function in looked.functions.values():
        sizes = {name: size(kind) for op, name, kind in values(function) if not op.type.startswith("const")}
        sizes |= {name: size(kind) for name, kind in function.inputs.items()}
        for op in function.ops:
            bound = {one.name for slot in op.inputs.values() for one in slot.arguments if one.name}
            bound |= {output.name for output in op.outputs}
            largest = max(largest, sum(sizes.get(name, 0) for name in bound))
    return looked.weight_bytes, sum(map(size, looked.states.values())), largest
