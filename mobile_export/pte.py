"""What a `.pte` holds, read from its flatbuffer part alone: no torch, no weights, in milliseconds.

Field numbers follow the order of fields in ExecuTorch's schema (exir/_serialize/program.fbs), which
flatbuffers keeps stable; a test reads the same file with ExecuTorch's own deserialiser.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from mobile_export.errors import ExportError
from mobile_export.flatbuffer import Table

_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "fp16",
    6: "fp32",
    7: "fp64",
    11: "bool",
    15: "bf16",
}
_INT, _BOOL, _DOUBLE, _TENSOR, _STRING = 2, 3, 4, 5, 6
_KERNEL, _DELEGATE = 1, 2


class Value(msgspec.Struct, frozen=True):
    """An input or output of a method."""

    dtype: str
    shape: list[int]
    """Upper bounds when `dynamic`."""
    dynamic: bool = False


class PteMethod(msgspec.Struct, frozen=True):
    """A method that computes."""

    name: str
    inputs: list[Value]
    outputs: list[Value]
    delegates: dict[str, int]
    """Delegate calls by backend."""
    operators: dict[str, int]
    """Calls outside any delegate, by operator."""
    planned_bytes: int
    """Memory for activations and state, allocated when the method is loaded."""


class PteSummary(msgspec.Struct, frozen=True):
    """A `.pte` without its weights."""

    methods: list[PteMethod]
    constants: dict[str, Any]
    """Constant methods and what they return."""
    segments: dict[str, int]
    """Bytes in the file by kind: program, constants, mutable, delegates, named data.

    `shared` are not in the file again: bytes that one segment reads from within another.
    """
    named_data: int
    """Blobs that methods and delegates share by name."""


def read(path: Path) -> PteSummary:
    """Summary of a `.pte`. ExportError when it is not one, or is cut short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != b"ET12":
                raise ExportError(f"'{path.name}' is not an ExecuTorch program", "name a .pte file")
            return _summary(data)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        raise ExportError(f"'{path.name}' is damaged or cut short", "export it again") from None


def _summary(data: mmap.mmap) -> PteSummary:
    program = Table.root(data)
    methods, constants = [], {}
    for plan in program.tables(1):
        name, values = plan.text(0), list(plan.tables(2))
        inputs, outputs = ([values[index] for index in plan.numbers(slot, "i")] for slot in (3, 4))
        instructions = [call for chain in plan.tables(5) for call in chain.tables(2)]
        if not inputs and not instructions:
            returned = [_constant(value) for value in outputs]
            constants[name] = returned[0] if len(returned) == 1 else returned
            continue
        backends = [delegate.text(0) for delegate in plan.tables(7)]
        operators = [_operator(table) for table in plan.tables(6)]
        methods.append(
            PteMethod(
                name,
                [_value(value) for value in inputs],
                [_value(value) for value in outputs],
                _count(backends[number] for number in _called(instructions, _DELEGATE)),
                _count(operators[number] for number in _called(instructions, _KERNEL)),
                sum(plan.numbers(8, "q")),
            )
        )
    named = list(program.tables(7))
    return PteSummary(methods, constants, _segments(data, program, named), len(named))


def _segments(data: mmap.mmap, program: Table, named: list[Table]) -> dict[str, int]:
    sizes: Counter[str] = Counter(program=len(data))
    header = data[8:12] == b"eh00"
    if not header:
        return dict(sizes)
    program_size, base = struct.unpack_from("<QQ", data, 16)
    kinds = {table.number(1, "I"): "named data" for table in named}
    if constants := program.table(5):
        kinds[constants.number(0, "I")] = "constants"
    for table in program.tables(6):
        kinds[table.number(0, "I")] = "mutable"
    sizes["program"] = program_size
    described = [(one.number(0, "Q"), one.number(1, "Q"), at) for at, one in enumerate(program.tables(4))]
    end = 0
    for offset, size, index in sorted(described, key=lambda one: (one[0], -one[1])):
        if base + offset + size > len(data):
            raise ValueError("segment past the end")
        fresh = max(0, offset + size - max(end, offset))
        sizes[kinds.get(index, "delegates")] += fresh
        sizes["shared"] += size - fresh
        end = max(end, offset + size)
    return {kind: size for kind, size in sizes.items() if size}


def _called(instructions: list[Table], kind: int) -> Iterator[int]:
    for instruction in instructions:
        call = instruction.table(1)
        if instruction.number(0, "B") == kind and call:
            yield call.number(0, "i")


def _count(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _operator(table: Table) -> str:
    name, overload = table.text(0), table.text(1)
    return f"{name}.{overload}" if overload else name


def _value(value: Table) -> Value:
    kind, content = value.number(0, "B"), value.table(1)
    if kind != _TENSOR or content is None:
        return Value({_INT: "int", _BOOL: "bool", _DOUBLE: "float", _STRING: "text"}.get(kind, "other"), [])
    dtype = content.number(0, "b")
    return Value(_DTYPES.get(dtype, f"type {dtype}"), content.numbers(2, "i"), content.number(8, "b") != 0)


def _constant(value: Table) -> Any:
    kind, content = value.number(0, "B"), value.table(1)
    if content is None:
        return None
    if kind == _STRING:
        return content.text(0)
    if kind == _BOOL:
        return bool(content.number(0, "B"))
    if kind in (_INT, _DOUBLE):
        return content.number(0, "q" if kind == _INT else "d")
    return msgspec.to_builtins(_value(value))
