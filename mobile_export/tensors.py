"""safetensors files, written in a stream and read by mapping: neither copies the weights.

Each mapped tensor has its own storage of exactly its own bytes, which lowering code relies on.
Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LINE = 64
"""Bytes in a cache line, and the alignment of torch's own allocations."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous CPU tensors, in a fixed order: same tensors, same bytes. OSError when it cannot."""
    import torch

    codes = {dtype: code for code, dtype in _dtypes().items()}
    # Whole cache lines first, then the widest: all that matters starts aligned without padding, and
    # a matrix product over mapped weights rounds as it does over allocated ones.
    ordered = sorted(
        tensors.items(), key=lambda item: (item[1].nbytes % _LINE != 0, -item[1].itemsize, item[0])
    )
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": codes[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, copy-on-write: writing to one changes memory, never the file.

    ExportError when the file is cut short or its header does not describe it.
    """
    try:
        return _map(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExportError(f"'{path.name}' is not a whole safetensors file", "get it again") from None


def _map(path: Path) -> dict[str, Tensor]:
    import torch

    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("header past the end")
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        dtype, shape = _dtypes()[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(data) - start:
            raise ValueError("tensor past the end")
        count = (end - begin) // dtype.itemsize
        flat = (
            torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
            if count
            else torch.empty(0, dtype=dtype)
        )
        try:
            tensors[name] = flat.reshape(shape)
        except RuntimeError as error:
            raise ValueError("shape and size differ") from error
    return tensors


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
