"""What an artefact's bytes are for, from the names and places of its own tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from mobile_export.bundle import Bundle

Group = Literal["embedding", "attention", "mlp", "overhead"]
_PROJECTION = re.compile(r"(q|k|v|o|gate|up|down)_proj")
_MLP = ("gate", "up", "down")
_REST = "norms and tables"
_OVERHEAD = {"scale": "scales", "bias": "biases", "norm": _REST}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes of one kind. Weights are their numbers (codes, where quantized) alone."""

    group: Group
    name: str
    """E.g. `q_proj`, of all layers; of the overhead `scales`, `program`, `padding` and so on."""
    bytes: int


class Claim(NamedTuple):
    """A tensor's place in one of the artefact's files."""

    name: str
    file: str
    offset: int
    bytes: int


def parts(bundle: Bundle) -> tuple[Part, ...]:
    """What the files of role `program` consist of, to the byte, in the order of `Group`, largest first.

    Bytes that several tensors share count once; `padding` is what no tensor claims. ExportError: the
    artefact is damaged.
    """
    readers = {"executorch": _pte, "coreml": _package, "onnx": _onnx}
    claims = readers[bundle.manifest.target](bundle.path("program"))
    whole = sum(file.bytes for file in bundle.manifest.files.values() if file.role == "program")
    return tally(claims, whole)


def tally(claims: Iterable[Claim], whole: int) -> tuple[Part, ...]:
    """Claims added up by what their names say; what they leave of `whole` bytes is padding."""
    sizes: dict[tuple[Group, str], int] = {("overhead", "padding"): whole}
    end, file = 0, ""
    for claim in sorted(claims, key=lambda one: (one.file, one.offset, -one.bytes)):
        if claim.file != file:
            end, file = 0, claim.file
        stop = claim.offset + claim.bytes
        fresh = max(0, stop - max(end, claim.offset))
        end = max(end, stop)
        kind = classify(claim.name)
        sizes[kind] = sizes.get(kind, 0) + fresh
        sizes["overhead", "padding"] -= fresh
    groups = ("embedding", "attention", "mlp", "overhead")
    ordered = sorted(sizes.items(), key=lambda one: (groups.index(one[0][0]), -one[1], one[0][1]))
    return tuple(Part(group=group, name=name, bytes=size) for (group, name), size in ordered if size)


def classify(name: str) -> tuple[Group, str]:
    """Group and part of a tensor's name, e.g. `layers_0_mlp_up_proj_weight`: mlp, `up_proj`."""
    if name == "program":
        return "overhead", name
    for word, part in _OVERHEAD.items():
        if word in name:
            return "overhead", part
    if found := _PROJECTION.search(name):
        return "mlp" if found.group(1) in _MLP else "attention", found.group()
    if "embed" in name or "head" in name:
        return "embedding", "embedding and head"
    return "overhead", _REST


def _pte(path: Path) -> Iterator[Claim]:
    from mobile_export.report.pte_tensors import pte_tensors

    for name, offset, size in pte_tensors(path):
        yield Claim(name, path.name, offset, size)


def _package(path: Path) -> Iterator[Claim]:
    from mobile_export.mlpackage import open_package

    package = open_package(path)
    for function in package.functions:
        for op in package.operations(function):
            for name, value in _values(op):
                if blob := package.blob(value):
                    of = f"{op.outputs[0].name}_{name}"
                    yield Claim(of, blob.file, blob.offset, package.stored_bytes(value))
    for file in path.rglob("*"):
        if file.is_file() and file.parent.name != "weights":
            yield Claim("program", str(file), 0, file.stat().st_size)


def _values(op: Any) -> Iterator[tuple[str, Any]]:
    """A MIL operation's constants, by the name of its attribute or input."""
    yield from op.attributes.items()
    for name, argument in op.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield name, binding.value


def _onnx(path: Path) -> Iterator[Claim]:
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    from mobile_export.targets.onnx_file import data_file
    from mobile_export.targets.onnx_weights import pieces_of

    model = onnx.load(path, load_external_data=False)
    data, pieces = data_file(path).name, pieces_of(model)
    for name, piece in pieces.items():
        yield Claim(name, data, piece.offset, piece.bytes)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and tensor.name not in pieces:
            info = ExternalDataInfo(tensor)
            yield Claim(tensor.name, data, info.offset or 0, info.length or 0)
    yield Claim("program", path.name, 0, path.stat().st_size)
