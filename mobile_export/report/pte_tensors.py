"""Which bytes of a `.pte` are which weight. The file names none: the order of its calls does.

Delegates: ExecuTorch's backends/xnnpack/serialization/schema.fbs, behind a header `XH00` that
xnnpack_graph_serialize.py describes; the program: exir/_serialize/program.fbs.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mobile_export.errors import ExportError
from mobile_export.flatbuffer import Table
from mobile_export.pte_share import HEADER

_BYTES = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2}
"""Of ScalarType's values."""
_INT, _TENSOR, _KERNEL, _DELEGATE, _LINEAR, _QUANTIZED = 2, 5, 1, 2, 2, 2
"""Numbers in the schemas' unions."""
_QINT8_PER_CHANNEL = 6
_EMBEDDING = "quantized_decomposed::embedding_byte"


class _Linear(NamedTuple):
    """Keys of named data: of the weight, its scales and its bias; empty where there is none."""

    weight: str
    scale: str
    bias: str


class _Pte:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.program = Table.root(data)
        self.base = HEADER.unpack_from(data, 8)[3]
        self.segments = [(one.number(0, "Q"), one.number(1, "Q")) for one in self.program.tables(4)]
        self.named = {one.text(0): one.number(1, "I") for one in self.program.tables(7)}

    def segment(self, index: int) -> tuple[int, int]:
        """Offset in the file and size."""
        offset, size = self.segments[index]
        return self.base + offset, size


def pte_tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and bytes of every tensor of a `.pte`, and of what is no tensor, `program`.

    ExportError: the file is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from ((name, *place) for name, place in _places(_Pte(data)))
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise ExportError(f"'{path.name}' is damaged or cut short", "export it again") from None


def _places(pte: _Pte) -> Iterator[tuple[str, tuple[int, int]]]:
    plans = {plan.text(0): plan for plan in pte.program.tables(1)}
    yield from _constants(pte, plans["forward"])
    names = _names(_linears(pte, plans["forward"]), _layers(plans["get_n_layers"]))
    for key, index in pte.named.items():
        yield names.get(key, "table"), pte.segment(index)
    tensors = set(pte.named.values())
    if constants := pte.program.table(5):
        tensors.add(constants.number(0, "I"))
    yield "program", (0, pte.base)
    for index in set(range(len(pte.segments))) - tensors:
        yield "program", pte.segment(index)


def _constants(pte: _Pte, plan: Table) -> Iterator[tuple[str, tuple[int, int]]]:
    """Constant tensors of the program itself: the embedding's, norms and tables."""
    constants = pte.program.table(5)
    if constants is None:
        return
    start, offsets = pte.segment(constants.number(0, "I"))[0], constants.numbers(1, "Q")
    operators = [one.text(0) for one in plan.tables(6)]
    named: dict[int, str] = {}
    for call in _calls(plan, _KERNEL):
        if operators[call.number(0, "i")].startswith(_EMBEDDING):
            codes, scales, *_ = call.numbers(1, "i")
            named |= {codes: "embedding", scales: "embedding scales"}
    for index, value in enumerate(plan.tables(2)):
        tensor = value.table(1)
        if value.number(0, "B") != _TENSOR or tensor is None:
            continue
        buffer, sizes = tensor.number(5, "I"), tensor.numbers(2, "i")
        if buffer and not tensor.at(6):
            size = _BYTES[tensor.number(0, "b")]
            for length in sizes:
                size *= length
            yield named.get(index, "table"), (start + offsets[buffer], size)


def _names(linears: list[_Linear], layers: int) -> dict[str, str]:
    """Named data -> name. Each layer's linears go q, k, v, o, gate, up, down, then come mix and head.

    An MLP in parts has all its gates first, then all ups, then all downs. Only a rotated model has a mix.
    """
    parts, last = divmod(len(linears) - 4 * layers, 3 * layers)
    if not parts or last not in (1, 2):
        raise ValueError(f"{len(linears)} linears in {layers} layers")
    order = [*"qkvo", *["gate"] * parts, *["up"] * parts, *["down"] * parts]
    named = [f"layers_{layer}_{kind}_proj" for layer in range(layers) for kind in order]
    names: dict[str, str] = {}
    for linear, name in zip(linears, [*named, *("final_mix", "head")[-last:]], strict=True):
        pieces = {linear.bias: "_bias", linear.scale: "_scale", linear.weight: ""}
        names |= {key: name + what for key, what in pieces.items() if key}
    return names


def _layers(plan: Table) -> int:
    """What `get_n_layers` answers: the only number among its values."""
    found = [one.table(1) for one in plan.tables(2) if one.number(0, "B") == _INT]
    if len(found) != 1 or found[0] is None:
        raise ValueError("no get_n_layers")
    return int(found[0].number(0, "q"))


def _linears(pte: _Pte, plan: Table) -> list[_Linear]:
    """Products with int8 weights, in the order of the method's calls."""
    places = [one.table(1) for one in plan.tables(7)]
    found: list[_Linear] = []
    for call in _calls(plan, _DELEGATE):
        place = places[call.number(0, "i")]
        if place is not None:
            offset, size = pte.segment(place.number(1, "I"))
            found += _delegate(memoryview(pte.data[offset : offset + size]))
    return found


def _delegate(payload: memoryview) -> Iterator[_Linear]:
    if bytes(payload[4:8]) != b"XH00":
        raise ValueError("not a delegate of XNNPACK")
    graph = Table.root(payload[struct.unpack_from("<I", payload, 10)[0] :])
    keys = [one.text(2) for one in graph.tables(8)]
    values = {}
    for value in graph.tables(2):
        body = value.table(1)
        quantized = value.number(0, "B") == _QUANTIZED
        tensor = body.table(0) if quantized and body else body
        if tensor is not None:
            values[tensor.number(6, "I")] = (tensor, body if quantized else None)
    for node in graph.tables(1):
        linear = node.table(1)
        if node.number(0, "B") != _LINEAR or linear is None:
            continue
        weight, quantized = values[linear.number(1, "I")]
        if quantized is None or weight.number(0, "h") != _QINT8_PER_CHANNEL:
            continue
        scale: Any = quantized.table(2)
        bias = values.get(linear.number(2, "I"))
        yield _Linear(
            keys[weight.number(3, "I")],
            keys[scale.number(2, "I")],
            keys[bias[0].number(3, "I")] if bias else "",
        )


def _calls(plan: Table, kind: int) -> Iterator[Table]:
    """Calls of kernels or of delegates, in order."""
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            call = instruction.table(1)
            if instruction.number(0, "B") == kind and call is not None:
                yield call
