"""Codes as ONNX Runtime's products of 8 and 4 bits read them, and back.

An int8 code c is stored as the byte c + 128, a scale once a block of columns; int4 codes c + 8 two a
byte, the even column low, a scale a group. All are the shared program's own numbers, bit for bit.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mobile_export.errors import ExportError
from mobile_export.targets.onnx_file import ModelFile, data_file

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

METADATA = "codes"
"""Key in the model's metadata: codes tensor -> Piece."""
ZERO = 128
"""The byte of code 0: what the runtime takes for 8 bits when no zero point is given; for 4 bits 8."""
SMALLEST_BLOCK = 16


class Piece(NamedTuple):
    """Where a codes tensor is."""

    offset: int
    """In the data file."""
    rows: int
    columns: int
    bits: int = 8

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self.bits // 8


@dataclass(frozen=True)
class Packed:
    """Initializers: codes uint8 [rows, blocks, block * bits / 8], scales fp32 [rows, blocks].

    Of 8 bits, a row's scales are equal.
    """

    codes: str
    scales: str
    rows: int
    columns: int
    block: int
    bits: int = 8

    @property
    def blocks(self) -> int:
        return self.columns // self.block


def pack(
    file: ModelFile, codes: dict[str, np.ndarray], scales: Sequence[np.ndarray], block: int
) -> tuple[Packed, dict[str, Piece]]:
    """Store the rows of several weights one after another, and say where each one's codes are.

    codes int8 [rows, columns] by name; scales fp32 [rows] of each; `block` is the most columns a block
    has: the largest power of two up to it that divides `columns` is taken.
    """
    import numpy as np

    arrays = list(codes.values())
    columns = arrays[0].shape[1]
    fitting = math.gcd(columns, block)
    if fitting < SMALLEST_BLOCK:
        raise ExportError(
            f"ONNX Runtime's int8 products take widths that {SMALLEST_BLOCK} divides, not {columns}",
            "use another model",
        )
    packed = _described(codes, fitting, 8)

    def stored() -> np.ndarray:
        joined = np.concatenate(arrays).view(np.uint8) ^ ZERO
        return joined.reshape(packed.rows, packed.blocks, fitting)

    def repeated() -> np.ndarray:
        return np.repeat(np.concatenate(scales)[:, None], packed.blocks, axis=1)

    file.weight(packed.codes, stored, inline=0)
    file.weight(packed.scales, repeated, inline=0)
    return packed, _pieces(file, packed, codes)


def pack_int4(
    file: ModelFile, codes: dict[str, np.ndarray], scales: Sequence[np.ndarray]
) -> tuple[Packed, dict[str, Piece]]:
    """As `pack`: codes int8 [rows, columns] in [-8, 7], scales fp32 [rows, groups]; a block is a group."""
    import numpy as np

    columns = next(iter(codes.values())).shape[1]
    packed = _described(codes, columns // scales[0].shape[1], 4)

    def stored() -> np.ndarray:
        low, high = ((np.concatenate(list(codes.values()))[:, at::2] + 8).view(np.uint8) for at in (0, 1))
        return (low | high << 4).reshape(packed.rows, packed.blocks, packed.block // 2)

    file.weight(packed.codes, stored, inline=0)
    file.weight(packed.scales, lambda: np.concatenate(scales), inline=0)
    return packed, _pieces(file, packed, codes)


def _described(codes: dict[str, np.ndarray], block: int, bits: int) -> Packed:
    name, columns = next(iter(codes)), next(iter(codes.values())).shape[1]
    return Packed(name, name + "_scales", sum(map(len, codes.values())), columns, block, bits)


def _pieces(file: ModelFile, packed: Packed, codes: dict[str, np.ndarray]) -> dict[str, Piece]:
    at, pieces = file.offset(packed.codes), {}
    for part, array in codes.items():
        pieces[part] = Piece(at, len(array), packed.columns, packed.bits)
        at += pieces[part].bytes
    return pieces


def slices(file: ModelFile, whole: Packed, most_bytes: int) -> list[Packed]:
    """The same bytes of int8 codes as initializers of at most about `most_bytes`, each a run of rows."""
    step = max(64, most_bytes // whole.columns // 64 * 64)
    parts = []
    for index, first in enumerate(range(0, whole.rows, step)):
        count = min(step, whole.rows - first)
        codes, scales = (
            file.view(f"{name}_{index}", name, first, [count, *dims])
            for name, dims in ((whole.codes, (whole.blocks, whole.block)), (whole.scales, (whole.blocks,)))
        )
        parts.append(replace(whole, codes=codes, scales=scales, rows=count))
    return parts


def metadata(pieces: dict[str, Piece]) -> dict[str, list[int]]:
    """As `pieces_of` reads them: offset, rows, columns, and the bits where they are not 8."""
    return {name: list(piece[: 3 if piece.bits == 8 else 4]) for name, piece in pieces.items()}


def pieces_of(model: ModelProto) -> dict[str, Piece]:
    """Where each codes tensor is, by its name in the program. ExportError: the model does not say."""
    for entry in model.metadata_props:
        if entry.key == METADATA:
            return {name: Piece(*numbers) for name, numbers in json.loads(entry.value).items()}
    raise ExportError("the .onnx does not say where its codes are", "export it again")


def codes_of(model: Path) -> dict[str, np.ndarray]:
    """The shared codes as int8 [rows, columns], of a `.onnx` and its data file, by name in the program."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    pieces = pieces_of(proto)
    with data_file(model).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: _unpacked(data, piece) for name, piece in pieces.items()}


def _unpacked(data: mmap.mmap, piece: Piece) -> np.ndarray:
    import numpy as np

    stored = np.frombuffer(data, np.uint8, piece.bytes, piece.offset)
    if piece.bits == 4:
        codes = np.stack((stored & 15, stored >> 4), axis=1).view(np.int8) - np.int8(8)
    else:
        codes = (stored ^ ZERO).view(np.int8)
    return codes.reshape(piece.rows, piece.columns)
