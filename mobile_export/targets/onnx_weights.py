"""int8 codes as ONNX Runtime's 8-bit products read them, and back.

A code c is stored as the byte c + 128, a scale once a block of columns: both are the shared program's
own numbers, bit for bit.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.targets.onnx_file import ModelFile, data_file

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

Piece = tuple[int, int, int]
"""Where a codes tensor is: offset in the data file, rows, columns."""
METADATA = "codes"
"""Key in the model's metadata: codes tensor -> Piece."""
ZERO = 128
"""The byte of code 0: what the runtime takes for 8 bits when no zero point is given."""
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Packed:
    """Initializers: codes uint8 [rows, blocks, block], scales fp32 [rows, blocks], equal along a row."""

    codes: str
    scales: str
    rows: int
    columns: int
    block: int

    @property
    def blocks(self) -> int:
        return self.columns // self.block

    @property
    def bytes(self) -> int:
        return self.rows * self.columns


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
    name, rows, blocks = next(iter(codes)), sum(map(len, arrays)), columns // fitting

    def stored() -> np.ndarray:
        return (np.concatenate(arrays).view(np.uint8) ^ ZERO).reshape(rows, blocks, fitting)

    def repeated() -> np.ndarray:
        return np.repeat(np.concatenate(scales)[:, None], blocks, axis=1)

    file.weight(name, stored, inline=0)
    file.weight(name + "_scales", repeated, inline=0)
    at = file.offset(name)
    pieces: dict[str, Piece] = {}
    for part, array in codes.items():
        pieces[part] = (at, len(array), columns)
        at += array.nbytes
    return Packed(name, name + "_scales", rows, columns, fitting), pieces


def slices(file: ModelFile, whole: Packed, most_bytes: int) -> list[Packed]:
    """The same bytes as initializers of at most about `most_bytes`, each a run of rows."""
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


def pieces_of(model: ModelProto) -> dict[str, Piece]:
    """Where each codes tensor is, by its name in the program. ExportError: the model does not say."""
    for entry in model.metadata_props:
        if entry.key == METADATA:
            return {
                name: (at, rows, columns) for name, (at, rows, columns) in json.loads(entry.value).items()
            }
    raise ExportError("the .onnx does not say where its codes are", "export it again")


def codes_of(model: Path) -> dict[str, np.ndarray]:
    """The shared int8 codes [rows, columns] in a `.onnx` and its data file, by their names in the program."""
    import numpy as np
    import onnx

    proto = onnx.load(model, load_external_data=False)
    pieces = pieces_of(proto)
    with data_file(model).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: (np.frombuffer(data, np.uint8, rows * columns, at) ^ ZERO).view(np.int8).reshape(rows, columns)
        for name, (at, rows, columns) in pieces.items()
    }
