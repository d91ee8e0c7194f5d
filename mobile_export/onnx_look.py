"""What a `.onnx` holds, read without its weights and without ONNX Runtime.

Its weights may be in files of their own: these are found and measured, not read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from mobile_export.errors import ExportError
from mobile_export.files import inside

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_AGAIN = "export it again, or copy it again with its data file"
_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}
CODES = "codes"
"""Metadata of our exports: codes tensor -> [offset in the data file, rows, columns], bits if not 8."""


class OnnxValue(msgspec.Struct, frozen=True):
    """An input or output; a string in `shape` names a dimension that varies."""

    name: str
    dtype: str
    shape: list[int | str]
    optional: bool = False
    """Whether the model has a default for it."""


class OnnxSummary(msgspec.Struct, frozen=True):
    """What the model says of itself."""

    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: list[OnnxValue]
    outputs: list[OnnxValue]
    operators: dict[str, int]
    """Nodes by operator, those of a domain of its own as `domain:Operator`."""
    weights: dict[str, int]
    """Bytes by type, in the model or outside."""
    shared_bytes: int
    """How many of these are others' bytes in a data file, seen under another name or in part."""
    data_files: dict[str, int]
    """Files of weights beside the model, and their sizes."""
    int8_codes: dict[str, list[int]]
    """Rows and columns by name, of our own exports."""
    int4_codes: dict[str, list[int]]


class _Codes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    offset: int
    rows: int
    columns: int
    bits: Literal[4, 8] = 8


class External(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    bytes: int


def read(path: Path) -> OnnxSummary:
    """Raises ExportError when it is no ONNX model, or its weights are missing, cut or outside its folder."""
    return summary(open_model(path), path)


def open_model(path: Path) -> ModelProto:
    """The model, each of its tensors' places checked. Raises ExportError as `read` does."""
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        _check_texts(model)
    except (DecodeError, UnicodeDecodeError):
        raise ExportError(f"'{path.name}' is damaged or not an ONNX model", _AGAIN) from None
    if not (model.ir_version and model.opset_import and model.graph.node):
        raise ExportError(f"'{path.name}' is not an ONNX model", "name a .onnx")
    for tensor in tensors(model):
        external(tensor, path)
    return model


def summary(model: ModelProto, path: Path) -> OnnxSummary:
    """Of an opened model."""
    held = {tensor.name for tensor in model.graph.initializer}
    weights: Counter[str] = Counter()
    places = []
    for tensor in tensors(model):
        weights[_dtype(tensor.data_type)] += size(tensor)
        places += [place] if (place := external(tensor, path)) else []
    return OnnxSummary(
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        inputs=[_value(value, held) for value in model.graph.input],
        outputs=[_value(value) for value in model.graph.output],
        operators=dict(Counter(operator(node) for node in nodes(model)).most_common()),
        weights=dict(sorted(weights.items())),
        shared_bytes=sum(place.bytes for place in places) - _covered(places),
        data_files={
            file.relative_to(path.parent).as_posix(): file.stat().st_size
            for file in sorted({place.file for place in places})
        },
        int8_codes=_codes(model, path, 8),
        int4_codes=_codes(model, path, 4),
    )


def operator(node: NodeProto) -> str:
    """`Operator`, or `domain:Operator` where the domain is not ONNX's own."""
    return f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """All, those of subgraphs and functions too."""
    for graph in _graphs(model):
        yield from graph.node


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All that have bytes: initializers, and those in nodes' attributes."""
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for node in graph.node:
            for attribute in node.attribute:
                yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]


def size(tensor: TensorProto) -> int:
    """Bytes of its elements."""
    kind = _dtype(tensor.data_type)
    found = re.search(r"\d+", kind)
    bits = int(found.group()) if found else 8 * (kind == "bool")
    return math.prod(tensor.dims) * bits // 8


def external(tensor: TensorProto, model: Path) -> External | None:
    """Where a tensor's bytes are; None when they are in the model.

    Raises ExportError when that is outside the model's folder, or the file does not have them.
    """
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    said = {entry.key: entry.value for entry in tensor.external_data}
    name = said.get("location", "")
    try:
        offset = int(said.get("offset", 0))
        length = int(said.get("length", size(tensor)))
    except ValueError:
        offset = length = -1
    if not name or "\0" in name or offset < 0 or length != size(tensor) or min(tensor.dims, default=0) < 0:
        raise ExportError(f"'{model.name}' is damaged: it does not say where '{tensor.name}' is", _AGAIN)
    file = inside(model.parent, name)
    if not file.is_file():
        raise ExportError(f"'{model.name}' lacks its data file '{name}'", _AGAIN)
    if offset + length > file.stat().st_size:
        said_bytes = f"{file.stat().st_size} bytes, not {offset + length}"
        raise ExportError(f"'{name}' is cut short: it has {said_bytes}", _AGAIN)
    return External(file, offset, length)


def _check_texts(message: Any) -> None:
    """UnicodeDecodeError where a text field is none: the parser hands such a field out as bytes."""
    for field, value in message.ListFields():
        many = value if field.is_repeated else [value]
        if field.type == field.TYPE_MESSAGE:
            for one in many:
                _check_texts(one)
        elif field.type == field.TYPE_STRING:
            for one in many:
                _ = one if isinstance(one, str) else one.decode()


def _graphs(model: ModelProto) -> Iterator[GraphProto | Any]:
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _value(value: Any, held: set[str] = frozenset()) -> OnnxValue:  # type: ignore[assignment]
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "any" for dim in kind.shape.dim]
    return OnnxValue(value.name, _dtype(kind.elem_type), shape, value.name in held)


def _dtype(number: int) -> str:
    from onnx import TensorProto

    kinds = {value: name.lower() for name, value in TensorProto.DataType.items()}  # type: ignore[attr-defined]
    name = kinds.get(number, "undefined")
    return _NAMES.get(name, name)


def _covered(places: list[External]) -> int:
    """Bytes of the files that are in at least one place."""
    total = end = 0
    file = None
    for place in sorted(places):
        end = end if place.file == file else 0
        file = place.file
        total += max(0, place.offset + place.bytes - max(end, place.offset))
        end = max(end, place.offset + place.bytes)
    return total


def _codes(model: ModelProto, path: Path, bits: int) -> dict[str, list[int]]:
    text = next((entry.value for entry in model.metadata_props if entry.key == CODES), "{}")
    try:
        pieces = msgspec.convert(json.loads(text), dict[str, _Codes])
    except (ValueError, msgspec.ValidationError):
        raise ExportError(f"'{path.name}' is damaged: its metadata '{CODES}' is not ours", _AGAIN) from None
    return {name: [piece.rows, piece.columns] for name, piece in pieces.items() if piece.bits == bits}
