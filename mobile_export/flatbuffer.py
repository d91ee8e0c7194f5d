"""Reading flatbuffers tables without a schema compiler: https://flatbuffers.dev/internals."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any


class Table:
    """A table at `position` of `data`; fields go by their number in the schema."""

    def __init__(self, data: Any, position: int) -> None:
        self.data, self.position = data, position
        self.fields = position - struct.unpack_from("<i", data, position)[0]

    @classmethod
    def root(cls, data: Any) -> Table:
        """The file's root table."""
        return cls(data, _u32(data, 0))

    def at(self, slot: int) -> int:
        """Where a field is, or 0 when the file does not have it (it holds its default)."""
        offset = 4 + 2 * slot
        inside = _u16(self.data, self.fields + offset) if offset < _u16(self.data, self.fields) else 0
        return self.position + inside if inside else 0

    def number(self, slot: int, code: str) -> Any:
        """A scalar by its `struct` code; 0 where it is absent."""
        at = self.at(slot)
        return struct.unpack_from("<" + code, self.data, at)[0] if at else 0

    def table(self, slot: int) -> Table | None:
        """A table field."""
        at = self.at(slot)
        return Table(self.data, at + _u32(self.data, at)) if at else None

    def text(self, slot: int) -> str:
        """A string field; empty where it is absent."""
        start, length = self._vector(slot)
        return bytes(self.data[start : start + length]).decode()

    def numbers(self, slot: int, code: str) -> list[Any]:
        """A vector of scalars."""
        start, length = self._vector(slot)
        return list(struct.unpack_from(f"<{length}{code}", self.data, start)) if length else []

    def tables(self, slot: int) -> Iterator[Table]:
        """A vector of tables."""
        for index, offset in enumerate(self.numbers(slot, "I")):
            yield Table(self.data, self._vector(slot)[0] + 4 * index + offset)

    def _vector(self, slot: int) -> tuple[int, int]:
        at = self.at(slot)
        if not at:
            return 0, 0
        start = at + _u32(self.data, at)
        length = _u32(self.data, start)
        if start + 4 + length > len(self.data):
            raise ValueError("vector past the end")
        return start + 4, length


def _u16(data: Any, at: int) -> int:
    return int(struct.unpack_from("<H", data, at)[0])


def _u32(data: Any, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])
