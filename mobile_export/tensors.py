"""safetensors files, written in a stream and read by mapping: neither copies the weights.

Each mapped tensor has its own storage of exactly its own bytes, which lowering code relies on.
Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LINE = 64
"""Bytes in a cache line, and the alignment of torch's own allocations."""
_LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library."""


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

    ExportError when the file is cut short, or its header does not describe it.
    """
    import torch

    header = read_header(path)
    dtypes = _dtypes()
    if strange := sorted({entry.dtype for entry in header.values()} - dtypes.keys()):
        raise ExportError(f"'{path.name}' has tensors of type {strange[0]}", "save them as F32, F16 or BF16")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        dtype, count = dtypes[entry.dtype], math.prod(entry.shape)
        if count * dtype.itemsize != entry.end - entry.begin:
            raise _damaged(path)
        empty = torch.empty(0, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=entry.begin) if count else empty
        tensors[name] = flat.reshape(entry.shape)
    return tensors


class Entry(msgspec.Struct, frozen=True):
    """Where a tensor is: bytes `[begin, end)` of the file."""

    dtype: str
    """As safetensors names it, e.g. `F32`."""
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors a file holds, without reading them. ExportError when the header does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 10 <= start <= min(size, _LONGEST_HEADER):
            raise _damaged(path)
        text = file.read(start - 8)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        entries = {name: _entry(one, start) for name, one in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path) from None
    if any(not start <= entry.begin <= entry.end <= size for entry in entries.values()):
        raise _damaged(path)
    return entries


def _entry(table: dict[str, Any], start: int) -> Entry:
    begin, end = table["data_offsets"]
    if any(length < 0 for length in table["shape"]):
        raise ValueError("negative length")
    return Entry(str(table["dtype"]), tuple(table["shape"]), start + begin, start + end)


def _damaged(path: Path) -> ExportError:
    return ExportError(f"'{path.name}' is not a whole safetensors file", "get it again")


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
