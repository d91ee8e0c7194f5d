"""A delegate's XNNPACK graph, opened for taps: its values become outputs, its weights stay where they are.

Layout: a header `XH00`, then a flatbuffer of ExecuTorch's schema (backends/xnnpack/serialization),
then constants, if they are not the program's named data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

_OUTPUT = 2
"""XNN_VALUE_FLAG_EXTERNAL_OUTPUT."""


class Product(NamedTuple):
    """Ids of what a product reads and gives; several are columns side by side."""

    operands: list[int]
    outputs: list[int]


class Graph:
    """Nodes and values of one delegate."""

    def __init__(self, payload: bytes) -> None:
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
        from executorch.exir._serialize._flatbuffer import _flatc_decompile

        header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
        flatbuffer = payload[header.flatbuffer_offset :][: header.flatbuffer_size]
        self._constants = payload[header.constant_data_offset :][: header.constant_data_size]
        self._table: dict[str, Any] = json.loads(_flatc(flatbuffer, ".bin", ".json", _flatc_decompile))
        self.nodes: list[tuple[str, dict[str, Any]]] = [
            (node["xnode_union_type"], node["xnode_union"]) for node in self._table["xnodes"]
        ]
        """Type and fields, in the order they run."""
        values = (value["xvalue_union"] for value in self._table["xvalues"])
        tensors = [value.get("tensor_value", value) for value in values]
        self.values: dict[int, dict[str, Any]] = {tensor["id_out"]: tensor for tensor in tensors}

    def argument(self, value: int) -> tuple[int, bool]:
        """Which of the delegate's arguments a value is, and whether it was made one now."""
        tensor = self.values[value]
        external = {*self._table["input_ids"], *self._table["output_ids"]}
        if value in external:
            return tensor["external_id"], False
        tensor["external_id"] = self._table["num_externs"]
        tensor["flags"] |= _OUTPUT
        self._table["num_externs"] += 1
        self._table["output_ids"].append(value)
        return tensor["external_id"], True

    def products(self) -> tuple[list[Product], list[int]]:
        """Products with int8 activations, in the order they run, and the sums that take one in.

        An MLP in parts (targets/executorch_mlp.py) is three products, as it was before it was cut.
        """
        made = {node["output_id"]: node["input_id"] for kind, node in self.nodes if kind == "XNNConvert"}
        found: list[Product] = []
        totals: dict[int, list[Product]] = {}
        sums: list[int] = []
        for kind, node in self.nodes:
            if kind == "XNNFullyConnected" and node["input1_id"] in made:
                found.append(Product([made[node["input1_id"]]], [node["output_id"]]))
                totals[node["output_id"]] = found[-1:]
            elif kind == "XNNAdd":
                terms = [(node[name], totals.pop(node[name], [])) for name in ("input1_id", "input2_id")]
                if all(parts for _, parts in terms):
                    totals[node["output_id"]] = terms[0][1] + terms[1][1]
                elif any(parts for _, parts in terms):
                    sums.append(node["output_id"])
                    self._join(found, *next((total, parts) for total, parts in terms if parts))
        return found, sums

    def _join(self, found: list[Product], total: int, parts: list[Product]) -> None:
        """The products of an MLP in parts become its gate, up and down."""
        if len(parts) == 1:
            return
        by_output = {product.outputs[0]: product for product in found}
        inputs = {
            node["output_id"]: (node["input1_id"], node["input2_id"])
            for kind, node in self.nodes
            if kind == "XNNMultiply"
        }
        gates, ups = [], []
        for part in parts:
            plain, silu = sorted(inputs[part.operands[0]], key=lambda value: value not in by_output)
            ups.append(by_output[plain])
            gates.append(next(by_output[value] for value in inputs[silu] if value in by_output))
        first = min(found.index(part) for part in gates)
        for part in (*gates, *ups, *parts):
            found.remove(part)
        gate, up = (Product(which[0].operands, [part.outputs[0] for part in which]) for which in (gates, ups))
        found[first:first] = [gate, up, Product([part.operands[0] for part in parts], [total])]

    def encode(self) -> bytes:
        """The payload, with the arguments that were added."""
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
        from executorch.exir._serialize._flatbuffer import _flatc_compile

        flatbuffer = _flatc(json.dumps(self._table).encode(), ".json", ".bin", _flatc_compile)
        begin = -(-XNNHeader.EXPECTED_LENGTH // 16) * 16
        end = -(-(begin + len(flatbuffer)) // 16) * 16
        header = XNNHeader(begin, len(flatbuffer), end, len(self._constants)).to_bytes()
        return header.ljust(begin, b"\0") + flatbuffer.ljust(end - begin, b"\0") + self._constants


def _flatc(data: bytes, before: str, after: str, convert: Callable[[str, str, str], None]) -> bytes:
    """A graph in another form, by the compiler that ExecuTorch brings."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes

    with TemporaryDirectory() as folder:
        schema, given = Path(folder, "graph.fbs"), Path(folder, "graph" + before)
        schema.write_bytes(_get_schema_bytes())
        given.write_bytes(data)
        convert(folder, str(schema), str(given))
        return given.with_suffix(after).read_bytes()
