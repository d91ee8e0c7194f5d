"""`.ort`, the file that minimal builds of ONNX Runtime read: a model and its weights in a flatbuffer.

Its schema: onnxruntime/core/flatbuffers/schema/ort.fbs in ONNX Runtime's sources.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError
from mobile_export.files import disk_errors
from mobile_export.flatbuffer import Table
from mobile_export.targets.onnx import runtime
from mobile_export.targets.onnx_io import LOGITS
from mobile_export.targets.onnx_weights import METADATA

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

VERSION, MODEL, KERNELS = 0, 1, 3
"""Fields of the root table."""


def to_ort(model: Path, out: Path) -> None:
    """Convert a `.onnx` and its data file to `out`, which holds the weights itself; the same bytes each time.

    Every initializer is a copy there. So the head's slices become the one tensor that the embedding
    reads, and what stands twice is the head's scales alone, in the shapes of their two readers.
    Optimizations are the basic ones, which no CPU decides. Needs about one and a half times the model's
    size in memory. Raises ExportError where the runtime refuses, as it does past a flatbuffer's 2 GB.
    """
    import onnx

    proto = onnx.load(model, load_external_data=False)
    _join_head(proto)
    proto.metadata_props.remove(next(entry for entry in proto.metadata_props if entry.key == METADATA))
    with disk_errors("the .ort"), tempfile.TemporaryDirectory(dir=out.parent) as folder:
        saved, ordered = Path(folder) / "saved.ort", Path(folder) / "ordered.ort"
        try:
            _save(proto, model.parent, saved)
        except Exception as error:
            said = str(error).splitlines()[0][:200]
            raise ExportError(
                f"ONNX Runtime did not convert '{model.name}': {said}", "ship the .onnx"
            ) from None
        _order(saved, ordered)
        ordered.replace(out)


def _save(proto: ModelProto, weights: Path, out: Path) -> None:
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    for key, value in {
        "session.save_model_format": "ORT",
        "session.model_external_initializers_file_folder_path": str(weights.resolve()),
        "session.disable_prepacking": "1",
    }.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _join_head(proto: ModelProto) -> None:
    """Make one product of the head's slices where another initializer has the bytes of all of them."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    concat = next(node for node in graph.node if LOGITS in node.output)
    if concat.op_type != "Concat":
        return
    head, *others = (node for node in graph.node if set(node.output) & set(concat.input))
    slices = {node.input[place] for node in (head, *others) for place in (1, 2)}
    start = _place(weights[head.input[1]])
    whole = [name for name, tensor in weights.items() if _place(tensor) == start and name not in slices]
    if not whole or len(head.input) > 3:
        return
    rows, scales = weights[whole[0]].dims[0], weights[head.input[2]]
    length = next(entry for entry in scales.external_data if entry.key == "length")
    length.value = str(int(length.value) // scales.dims[0] * rows)
    scales.dims[0] = rows
    head.input[1], head.output[0] = whole[0], LOGITS
    next(attribute for attribute in head.attribute if attribute.name == "N").i = rows
    for node in [*others, concat]:
        graph.node.remove(node)
    for name in slices - {scales.name}:
        graph.initializer.remove(weights[name])


def _place(tensor: TensorProto) -> int | None:
    """Where an external tensor starts in the data file."""
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), None)


def _order(saved: Path, out: Path) -> None:
    """Copy a `.ort`, what stands before its model written anew.

    The runtime lays the model out in graph order, and before it the kernels' argument names in the order
    of a hash table that differs from process to process.
    """
    import mmap

    with saved.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        root = Table.root(data)
        model = root.table(MODEL)
        assert model is not None
        start = min(model.position, model.fields)
        head = _head(root, model.position - start, len(data) - start)
        del root, model
        file.seek(start)
        with out.open("wb") as ordered:
            ordered.write(head)
            shutil.copyfileobj(file, ordered, 1 << 24)


def _head(root: Table, model: int, rest: int) -> bytes:
    """Root table and kernels' argument names, to stand before `rest` bytes, of which `model` is the model."""
    import flatbuffers

    builder = flatbuffers.Builder()
    builder.StartObject(0)
    stand_in = builder.EndObject()
    kernels = root.table(KERNELS)
    assert kernels is not None
    entries = _vector(builder, [_kernel(builder, entry) for entry in kernels.tables(0)])
    names = _table(builder, [entries])
    version = builder.CreateString(root.text(VERSION))
    builder.StartObject(4)
    for field, value in ((VERSION, version), (MODEL, stand_in), (KERNELS, names)):
        builder.PrependUOffsetTRelativeSlot(field, value, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ORTM")
    head = bytearray(builder.Output())
    head += bytes(-(len(head) + rest) % 16)
    at = Table.root(head).at(MODEL)
    struct.pack_into("<I", head, at, len(head) + model - at)
    return bytes(head)


def _kernel(builder: Any, entry: Table) -> int:
    """An operator's id; by type parameter, the arguments it types: input or output, and index."""
    named = []
    for parameter in entry.tables(1):
        arguments = []
        for argument in parameter.tables(1):
            builder.StartObject(2)
            builder.PrependUint32Slot(1, argument.number(1, "I"), 0)
            builder.PrependInt8Slot(0, argument.number(0, "b"), 0)
            arguments.append(builder.EndObject())
        name = builder.CreateString(parameter.text(0))
        named.append(_table(builder, [name, _vector(builder, arguments)]))
    return _table(builder, [builder.CreateString(entry.text(0)), _vector(builder, named)])


def _vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _table(builder: Any, offsets: list[int]) -> int:
    builder.StartObject(len(offsets))
    for field, offset in enumerate(offsets):
        builder.PrependUOffsetTRelativeSlot(field, offset, 0)
    return builder.EndObject()
