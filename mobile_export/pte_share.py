"""Storing once what a `.pte` holds twice.

A tied embedding and head are one tensor of codes, but ExecuTorch writes it twice: the portable
embedding reads a constant of the program, the XNNPACK head a named blob with a segment of its own.
The format describes segments by offset and size, so one description may point into another's bytes:
the runtime loads both as before, from one place in the file.

Layout: ExecuTorch's schema (exir/_serialize/program.fbs) and its extended header `eh00`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mobile_export.errors import ExportError
from mobile_export.flatbuffer import Table

SMALLEST = 1 << 16
"""Blobs below this many bytes are left alone: nothing to win."""
ALIGNMENT = 128
"""Of each segment in the file, as ExecuTorch's own serialiser lays them out by default."""
HEADER = struct.Struct("<4sIQQQ")
"""Magic, length, program size, segment base, bytes of all segments; after the root and file magic."""


@dataclass(frozen=True)
class _Segment:
    offset: int
    data: memoryview
    field: int
    """Where the file holds `offset`; 0 if it is absent (then it is 0)."""


def share_constants(data: bytes) -> bytes:
    """The same program, each named blob that equals one of its constants stored once."""
    base = HEADER.unpack_from(data, 8)[3]
    program = Table.root(data)
    segments = [_segment(data, base, table) for table in program.tables(4)]
    constants = program.table(5)
    if constants is None:
        return data
    index, offsets = constants.number(0, "I"), constants.numbers(1, "Q")
    moved: dict[int, int] = {}
    for blob in sorted({named.number(1, "I") for named in program.tables(7)} - {index}):
        where = _find(segments[blob].data, segments[index].data, offsets)
        if where is not None:
            moved[blob] = where
    return _rewrite(data[:base], segments, index, moved) if moved else data


def _segment(data: bytes, base: int, table: Table) -> _Segment:
    offset, size = table.number(0, "Q"), table.number(1, "Q")
    return _Segment(offset, memoryview(data)[base + offset : base + offset + size], table.at(0))


def _find(blob: memoryview, constants: memoryview, offsets: list[int]) -> int | None:
    """At which of the constants' offsets their segment holds exactly the blob's bytes."""
    if len(blob) < SMALLEST:
        return None
    return next((at for at in offsets if constants[at : at + len(blob)] == blob), None)


def _rewrite(head: bytes, segments: list[_Segment], constants: int, moved: dict[int, int]) -> bytes:
    """The file with all segments but the moved ones, which point into the constants."""
    head_bytes, end = bytearray(head), 0
    body: list[bytes | memoryview] = []
    places: dict[int, int] = {}
    for index in sorted(set(range(len(segments))) - set(moved), key=lambda index: segments[index].offset):
        padding = -end % ALIGNMENT
        places[index] = end + padding
        body += [bytes(padding), segments[index].data]
        end = places[index] + len(segments[index].data)
    places |= {index: places[constants] + offset for index, offset in moved.items()}
    for index, place in places.items():
        if segments[index].field:
            struct.pack_into("<Q", head_bytes, segments[index].field, place)
        elif place:
            raise ExportError("a .pte segment cannot be moved", "report this: the format changed")
    struct.pack_into("<Q", head_bytes, 8 + HEADER.size - 8, end)
    return b"".join((bytes(head_bytes), *body))
