"""A GGUF file, opened with checks: header, metadata, and that every tensor lies inside the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFReader

T = TypeVar("T")
GET_AGAIN = "the file is damaged or was altered: copy or download it again"
USE_COMMON_TYPE = "use a Q8_0, Q4_K_M or F16 file"


def check_header(file: Path) -> None:
    """Raise ExportError unless the file starts as a GGUF of a version we can read."""
    with file.open("rb") as handle:
        start = handle.read(8)
    if start[:4] != b"GGUF":
        raise ExportError(f"'{file.name}' is not a GGUF file", "give a .gguf file, or a transformers folder")
    version = int.from_bytes(start[4:8], "little")
    if version not in (2, 3):
        raise ExportError(f"'{file.name}' is GGUF version {version}", "use a file of version 2 or 3")


def read(file: Path) -> GGUFReader:
    """Open a GGUF: its header is parsed and every tensor's data lies inside the file."""
    from gguf import GGUFReader

    check_header(file)
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        if "GGMLQuantizationType" in str(error):
            number = re.findall(r"\d+", str(error).split(" is not ")[0])[-1]
            raise ExportError(
                f"'{file.name}' has tensors of unknown type {number}", USE_COMMON_TYPE
            ) from None
        raise ExportError(f"'{file.name}' is damaged or cut short", GET_AGAIN) from None


class Metadata:
    """Typed look-ups in a GGUF's key-value part."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value at `key`, or None when the file does not have it."""
        value = self._value(key)
        return None if value is None else _checked(key, value, kind)

    def need(self, key: str, kind: type[T]) -> T:
        """The value at `key`; ExportError when the file does not have it."""
        value = self._value(key)
        if value is None:
            raise ExportError(f"the GGUF has no '{key}'", "use a file with a whole header")
        return _checked(key, value, kind)

    def _value(self, key: str) -> Any:
        field = self._fields.get(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, UnicodeDecodeError):
            raise ExportError(f"the GGUF's '{key}' is damaged", GET_AGAIN) from None


def _checked(key: str, value: Any, kind: type[T]) -> T:
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind):
        raise ExportError(f"the GGUF's '{key}' has the wrong type", "use a file with a whole header")
    return value
