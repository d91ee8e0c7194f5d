"""What a saved `.mlpackage` holds: its ML Program and its weights, read from the files alone.

The program is the protobuf of Core ML's format; weights are in blob storage, version 2: a header of
64 bytes, then records of 64 bytes (sentinel, type, size, place) that the program names by offset.
A test reads the same weights with coremltools' own reader.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mobile_export.errors import ExportError
from mobile_export.files import inside
from mobile_export.quiet import native

if TYPE_CHECKING:
    import numpy as np

_RECORD = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_ROOT = "@model_path/"
_AGAIN = "export it again"

# MIL.DataType by number: our name, numpy's, bits, and the number blob storage uses for it.
_TYPES = {
    1: ("bool", "bool", 8, None),
    2: ("string", None, 0, None),
    10: ("fp16", "float16", 16, 1),
    11: ("fp32", "float32", 32, 2),
    12: ("fp64", "float64", 64, None),
    21: ("int8", "int8", 8, 4),
    22: ("int16", "int16", 16, 6),
    23: ("int32", "int32", 32, 14),
    24: ("int64", "int64", 64, None),
    25: ("int4", "int8", 4, 8),
    31: ("uint8", "uint8", 8, 3),
    32: ("uint16", "uint16", 16, 7),
    33: ("uint32", "uint32", 32, 15),
    34: ("uint64", "uint64", 64, None),
    35: ("uint4", "uint8", 4, 11),
    36: ("uint2", "uint8", 2, 10),
    37: ("uint1", "uint8", 1, 9),
    38: ("uint6", "uint8", 6, 13),
    39: ("uint3", "uint8", 3, 12),
}
_BY_NAME = {row[0]: row for row in _TYPES.values()}


class Blob(NamedTuple):
    """Where a stored value lies. Values with one Blob are one tensor, wherever they are used."""

    file: str
    """Relative to the folder of the model file, e.g. `weights/weight.bin`."""
    offset: int


class TensorType(NamedTuple):
    """What the program declares about a value."""

    dtype: str
    """`fp16`, `fp32`, `int32`, `int8`, `uint4`, `bool`, `string`, ..."""
    shape: tuple[int | None, ...]
    """None for a dimension that is known only when it runs."""
    state: bool = False


class Codes(NamedTuple):
    """One quantized weight as stored: value = scale * (data - offset), block by block."""

    blob: Blob | None
    """None when the data is in the program itself (fewer than ten values)."""
    data: np.ndarray
    """int8 or uint8 (also for 4-bit codes), in the weight's shape."""
    scale: np.ndarray
    offset: np.ndarray | None


class Package:
    """A saved package, opened. `open_package` makes it; its weights stay on disk, mapped."""

    def __init__(self, name: str, spec: Any, folder: Path) -> None:
        self.name = name
        self.spec = spec
        """The Model message (specificationVersion, description, mlProgram)."""
        self.functions: dict[str, Any] = dict(spec.mlProgram.functions)
        """MIL Function messages by name."""
        self.constants: dict[Any, Any] = {}
        """Kept for readers: what they computed from blobs, so that it is computed once a package."""
        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}
        for value in _values(self.functions):
            if value.WhichOneof("value") == "blobFileValue":
                self._stored(value)

    @property
    def metadata(self) -> dict[str, str]:
        """shortDescription, author, license, versionString where set, and what the exporter added."""
        metadata = self.spec.description.metadata
        named = ("shortDescription", "author", "license", "versionString")
        fixed = {name: getattr(metadata, name) for name in named if getattr(metadata, name)}
        return {**fixed, **dict(sorted(metadata.userDefined.items()))}

    def operations(self, function: str) -> list[Any]:
        """MIL Operation messages of a function's block, in order."""
        return list(self.block(function).operations)

    def block(self, function: str) -> Any:
        """The block of the opset that the function names."""
        message = self.functions[function]
        if message.opset not in message.block_specializations:
            raise self._damaged(f"function '{function}' has no block for opset '{message.opset}'")
        return message.block_specializations[message.opset]

    def blob(self, value: Any) -> Blob | None:
        """Identity of a Value message kept in blob storage; None for one in the program itself."""
        if value.WhichOneof("value") != "blobFileValue":
            return None
        return Blob(value.blobFileValue.fileName.removeprefix(_ROOT), value.blobFileValue.offset)

    def stored_bytes(self, value: Any) -> int:
        """Bytes of a value in blob storage."""
        return len(self._stored(value))

    def value(self, value: Any) -> np.ndarray | str | list[str]:
        """A Value message as an array of its declared shape (rank 0 too), or as text.

        Arrays from blob storage are read-only views of the file, except types below a byte, which
        are unpacked to int8 or uint8.
        """
        kind = tensor_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            return _array(self._stored(value), kind)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            texts = list(tensor.strings.values)
            return texts if kind.shape else texts[0]
        if field is None:
            raise self._damaged("a constant without a value")
        try:
            values = getattr(tensor, field).values
            return _array(values, kind) if field == "bytes" else _listed(values, kind)
        except (ValueError, TypeError):
            raise self._damaged(f"a constant of type {kind.dtype} does not fill its shape") from None

    def codes(self) -> dict[str, Codes]:
        """Every `constexpr_blockwise_shift_scale` of every function, by the name of its output.

        Not those whose data or scale is itself computed (a palette of codes, say).
        A name that two functions use for different data is `function/name` in the second.
        """
        found: dict[str, Codes] = {}
        for function in self.functions:
            constants: dict[str, Any] = {}
            for op in self.operations(function):
                if op.type == "const":
                    constants[op.outputs[0].name] = op.attributes["val"]
                if op.type != "constexpr_blockwise_shift_scale":
                    continue
                data, scale, offset = (constant(op, name, constants) for name in ("data", "scale", "offset"))
                if data is None or scale is None:
                    continue
                parts = (self.value(one) if one else None for one in (data, scale, offset))
                codes = Codes(self.blob(data), *parts)  # type: ignore[arg-type]
                name = op.outputs[0].name
                if name in found and (found[name].blob != codes.blob or codes.blob is None):
                    name = f"{function}/{name}"
                found[name] = codes
        return found

    def _stored(self, value: Any) -> memoryview:
        """Bytes of a value in blob storage, after checking its record against the declaration."""
        kind = tensor_type(value.type)
        file, offset = self.blob(value) or ("", 0)
        data = self._file(file)
        if offset + 64 > len(data):
            raise self._damaged(f"'{file}' is cut short")
        sentinel, stored, size, at = _RECORD.unpack_from(data, offset)
        if sentinel != _SENTINEL:
            raise self._damaged(f"'{file}' has no value at {offset}")
        _, _, bits, number = _BY_NAME[kind.dtype]
        expected = (math.prod(size or 0 for size in kind.shape) * bits + 7) // 8
        if stored != number or size != expected:
            raise self._damaged(f"the value at {offset} of '{file}' is not what the program declares")
        if at + size > len(data):
            raise self._damaged(f"'{file}' is cut short")
        return memoryview(data)[at : at + size]

    def _file(self, name: str) -> mmap.mmap:
        if name not in self._files:
            try:
                with inside(self._folder, name).open("rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                raise self._damaged(f"'{name}' is missing or empty") from None
            if len(data) < 64 or struct.unpack_from("<I", data, 4)[0] != 2:
                raise self._damaged(f"'{name}' is not blob storage of version 2")
            self._files[name] = data
        return self._files[name]

    def _damaged(self, what: str) -> ExportError:
        return ExportError(f"'{self.name}' is damaged: {what}", _AGAIN)


def open_package(path: Path) -> Package:
    """Open a `.mlpackage` folder. ExportError when it is none, is damaged, or leads elsewhere.

    Every weight's record is checked against the program here; the weights themselves are not read.
    """
    model = _model_file(path)
    with native():
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(model.read_bytes())
    except (OSError, DecodeError):
        raise ExportError(f"'{path.name}' is damaged: its model cannot be read", _AGAIN) from None
    if spec.WhichOneof("Type") != "mlProgram" or not spec.mlProgram.functions:
        raise ExportError(f"'{path.name}' holds no ML Program", "name a package that `ios` exported")
    return Package(path.name, spec, model.parent)


def tensor_type(value_type: Any) -> TensorType:
    """A ValueType message of a tensor, or of a state that wraps one."""
    state = value_type.WhichOneof("type") == "stateType"
    if state:
        value_type = value_type.stateType.wrappedType
    tensor = value_type.tensorType
    if value_type.WhichOneof("type") != "tensorType" or tensor.dataType not in _TYPES:
        raise ExportError("a value of the program is of a type we do not read", "use tensors of known types")
    shape = tuple(
        one.constant.size if one.WhichOneof("dimension") == "constant" else None for one in tensor.dimensions
    )
    return TensorType(_TYPES[tensor.dataType][0], shape, state)


def constant(op: Any, name: str, constants: dict[str, Any]) -> Any:
    """The Value message behind an op's input or attribute; None when absent or not constant."""
    if name in op.attributes:
        return op.attributes[name]
    for binding in op.inputs[name].arguments if name in op.inputs else ():
        return constants.get(binding.name) if binding.WhichOneof("binding") == "name" else binding.value
    return None


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        raise ExportError(f"'{path}' is not a Core ML package", "name a .mlpackage folder")
    try:
        manifest = json.loads((path / "Manifest.json").read_bytes())
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        model = inside(path / "Data", item)
        # A link at Data itself would pass the check above.
        inside(path, f"Data/{item}")
    except OSError:
        raise ExportError(f"'{path.name}' has no Manifest.json", "name a .mlpackage folder") from None
    except (ValueError, KeyError, TypeError):
        raise ExportError(f"'{path.name}' is damaged: its Manifest.json names no model", _AGAIN) from None
    if not model.is_file():
        raise ExportError(f"'{path.name}' is damaged: '{item}' is missing", _AGAIN)
    return model


def _values(functions: dict[str, Any]) -> Iterator[Any]:
    """Every Value message of the functions' operations."""
    for function in functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                yield from op.attributes.values()
                bindings = (one for argument in op.inputs.values() for one in argument.arguments)
                yield from (one.value for one in bindings if one.WhichOneof("binding") == "value")


def _array(data: memoryview | bytes, kind: TensorType) -> np.ndarray:
    import numpy as np

    _, dtype, bits, _ = _BY_NAME[kind.dtype]
    if bits >= 8:
        return np.frombuffer(data, dtype).reshape(kind.shape)  # type: ignore[arg-type]
    return _unpack(np.frombuffer(data, np.uint8), bits, kind).reshape(kind.shape)  # type: ignore[arg-type]


def _unpack(packed: np.ndarray, bits: int, kind: TensorType) -> np.ndarray:
    """Values below a byte, packed from the lowest bit up, also across bytes."""
    import numpy as np

    count = math.prod(size or 0 for size in kind.shape)
    if bits == 4:
        flat = np.empty(2 * len(packed), np.uint8)
        flat[0::2], flat[1::2] = packed & 15, packed >> 4
        flat = flat[:count]
    else:
        single = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        flat = single @ (1 << np.arange(bits, dtype=np.uint8))
    return ((flat ^ 8).astype(np.int8) - 8) if kind.dtype == "int4" else flat


def _listed(values: Any, kind: TensorType) -> np.ndarray:
    import numpy as np

    array = np.array(values, _BY_NAME[kind.dtype][1])
    count = math.prod(size or 0 for size in kind.shape)
    # One value for a whole tensor is the format's short form of a tensor of equal values.
    return np.full(kind.shape, array[0]) if len(array) == 1 < count else array.reshape(kind.shape)  # type: ignore[arg-type]
