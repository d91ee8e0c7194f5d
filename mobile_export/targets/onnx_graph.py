"""The dialect written in ONNX Runtime's operators, by one walk over the shared program's graph.

Between two products tensors are [1, S, heads * head_dim]: the dialect's views and transposes to
[1, heads, S, head_dim] vanish, since GroupQueryAttention does them, rotary and the cache's update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError
from mobile_export.rewrite import editable, rotary_tables, tensor_of
from mobile_export.targets.onnx_file import MICROSOFT, ModelFile
from mobile_export.targets.onnx_io import (
    CACHES,
    LENGTHS,
    LOGITS,
    PAST,
    PRESENT,
    READ,
    TOKENS,
    add_inputs,
    add_outputs,
)
from mobile_export.targets.onnx_weights import Packed, Piece, pack, pack_int4, slices

if TYPE_CHECKING:
    import numpy as np
    from torch.fx import Node

    from mobile_export.recipe import ONNX as Options
    from mobile_export.types import Program

SLICE_BYTES = 16 << 20
"""Size of the slices that the head is cut into."""


@dataclass(frozen=True)
class _Part:
    """Columns of a product of several weights: part `index` of `value`, cut at `sizes`."""

    value: str
    index: int
    sizes: tuple[int, ...]


def build(
    program: Program, options: Options, file: ModelFile, slice_bytes: int = SLICE_BYTES
) -> dict[str, Piece]:
    """Add the program to `file`: inputs, outputs, nodes, weights. Returns where each codes tensor is."""
    return _Lowering(program, options, file, slice_bytes).run()


class _Lowering:
    """Writes one program's graph, op by op."""

    def __init__(self, program: Program, options: Options, file: ModelFile, slice_bytes: int) -> None:
        import torch

        self.dims, self.options, self.file, self.slice_bytes = program.dims, options, file, slice_bytes
        self.module = editable(program.exported)
        self.graph = self.module.graph
        self.graph.set_codegen(torch.fx.graph.CodeGen())
        self.tables = [table[:, : self.dims.head_dim // 2].numpy() for table in rotary_tables(program)]
        self.tokens, _, *self.caches = self.graph.find_nodes(op="placeholder")
        output: Any = self.graph.output_node()
        self.head: Node = output.args[0][0]
        self.last_attention = self.graph.find_nodes(
            op="call_function", target=torch.ops.mobile.attention.default
        )[-1]
        self.values: dict[Node, str | _Part] = {}
        self.cut: set[Node] = set()
        """Nodes whose value has the read positions only."""
        self.codes: dict[str, Piece] = {}
        self.shared: dict[int, str] = {}
        """Names of fp32 weights by their addresses."""

    def run(self) -> dict[str, Piece]:
        """Add everything; the pieces of every codes tensor."""
        add_inputs(self.file, self.dims, self.options)
        self._set(self.tokens, TOKENS)
        for name, table in zip(("cos", "sin"), self.tables, strict=True):
            self._weight(name, table)
        forms = self._forms()
        for node in self.graph.nodes:
            if node.target in forms and node not in self.values:
                made = forms[node.target](node, *node.args)
                if made is not None:
                    self._set(node, made)
        if self.values.get(self.head) != LOGITS:
            raise ExportError(
                "the program's logits are not a linear layer's", "report the model's name to us"
            )
        add_outputs(self.file, self.dims, self.options)
        return self.codes

    def _forms(self) -> dict[Any, Any]:
        import torch

        aten, mobile = torch.ops.aten, torch.ops.mobile

        def same(node: Node, x: Node, *_: Any) -> str | _Part | None:
            return self.values.get(x)

        return {
            aten.embedding.default: self._embedding_fp32,
            aten.linear.default: self._linear_fp32,
            mobile.embedding_int8.default: self._embedding,
            mobile.linear_int8.default: self._linear,
            mobile.linear_int4.default: self._linear,
            mobile.rms_norm.default: self._rms_norm,
            mobile.rotary.default: same,
            mobile.update_cache.default: lambda node, cache, new, start: self.values[new],
            mobile.attention.default: self._attention,
            aten.view.default: same,
            aten.reshape.default: same,
            aten.transpose.int: same,
            aten.silu.default: self._silu,
            aten.mul.Tensor: self._mul,
            aten.add.Tensor: self._add,
        }

    def _embedding(self, node: Node, ids: Node, codes: Node, scales: Node) -> str:
        packed = self._packed([codes], [scales])
        dims = [packed.rows, packed.blocks, 1]
        by_block = self.file.view(packed.scales + "_by_block", packed.scales, 0, dims)
        rows = self.file.call(
            f"{MICROSOFT}:GatherBlockQuantized",
            [packed.codes, self._value(ids), by_block],
            node.name + "_blocks",
            bits=8,
            block_size=packed.block,
            gather_axis=0,
            quantize_axis=2,
        )
        return self._reshape(rows, [0, 0, packed.columns], node.name)

    def _embedding_fp32(self, node: Node, weight: Node, ids: Node, *_: Any) -> str:
        table = self._shared_weight(weight)
        return self.file.call("Gather", [table, self._value(ids)], node.name)

    def _linear_fp32(self, node: Node, x: Node, weight: Node, bias: Node | None = None) -> str:
        """A Gemm, which reads a weight [rows, columns] as it is, so that a tied one stands once."""
        table, name = self._shared_weight(weight), LOGITS if node is self.head else node.name
        rows, columns = self._array(weight).shape
        flat = self._reshape(self._value(x), [-1, columns], name + "_flat")
        added = [self._weight(str(bias.target), self._array(bias))] if bias else []
        product = self.file.call("Gemm", [flat, table, *added], name + "_rows", transB=1)
        return self._reshape(product, [1, -1, rows], name)

    def _shared_weight(self, node: Node) -> str:
        """One initializer for all names of one tensor."""
        tensor = tensor_of(self.module, node)
        name = self.shared.setdefault(tensor.data_ptr(), str(node.target))
        return self._weight(name, tensor.detach().numpy())

    def _linear(self, node: Node, x: Node, codes: Node, scales: Node, bias: Node | None) -> str | _Part:
        """All products that read one value are one, so that threads meet once."""
        if node is self.head:
            return self._logits(x, codes, scales, bias)
        alike = [user for user in x.users if user.target == node.target]
        columns: Any = [list(column) for column in zip(*(user.args[1:] for user in alike), strict=True)]
        name = node.name if len(alike) == 1 else "_and_".join(user.name for user in alike)
        packed = self._packed(columns[0], columns[1])
        value = self._product(name, self._value(x), packed, self._biases(name, columns[0], columns[2]))
        if len(alike) == 1:
            return value
        sizes = tuple(len(self._array(part)) for part in columns[0])
        for index, user in enumerate(alike):
            self._set(user, _Part(value, index, sizes))
        return self.values[node]

    def _logits(self, x: Node, codes: Node, scales: Node, bias: Node | None) -> str:
        """The head, cut into slices of its rows.

        A runtime that packs weights as it loads holds each twice for a moment, and the head is a
        quarter of all: slices keep that peak low. They are initializers of their own even where the
        embedding has the same bytes, so that what was packed does not stay mapped for its sake.
        """
        whole = self._packed([codes], [scales])
        parts = slices(self.file, whole, self.slice_bytes)
        products, first = [], 0
        for index, part in enumerate(parts):
            name, rows = f"{LOGITS}_{index}", slice(first, first + part.rows)
            row_bias = bias and self._weight(f"{name}_bias", self._array(bias)[rows])
            products.append(self._product(name, self._value(x), part, row_bias or ""))
            first += part.rows
        return self.file.call("Concat", products, LOGITS, axis=-1)

    def _product(self, name: str, x: str, packed: Packed, bias: str) -> str:
        return self.file.call(
            f"{MICROSOFT}:MatMulNBits",
            [x, packed.codes, packed.scales, *(["", "", bias] if bias else [])],
            name,
            K=packed.columns,
            N=packed.rows,
            bits=packed.bits,
            block_size=packed.block,
            accuracy_level=self.options.accuracy_level,
        )

    def _packed(self, codes: list[Node], scales: list[Node]) -> Packed:
        arrays = {str(node.target): self._array(node) for node in codes}
        sizes = [self._array(node) for node in scales]
        if sizes[0].ndim == 2:
            packed, pieces = pack_int4(self.file, arrays, sizes)
        else:
            packed, pieces = pack(self.file, arrays, sizes, self.options.block)
        self.codes |= pieces
        return packed

    def _biases(self, name: str, codes: list[Node], biases: list[Node | None]) -> str:
        """One bias for a product of several weights; '' where none has any."""
        import numpy as np

        if not any(biases):
            return ""
        rows = [len(self._array(part)) for part in codes]
        parts = [
            np.zeros(count, np.float32) if bias is None else self._array(bias)
            for count, bias in zip(rows, biases, strict=True)
        ]
        return self._weight(name + "_bias", np.concatenate(parts))

    def _rms_norm(self, node: Node, x: Node, weight: Node, eps: float) -> str:
        scale, shape = self._weight(str(weight.target), self._array(weight)), node.meta["val"].shape
        if len(shape) == 3:
            return self._norm(self._value(x), scale, node.name, eps)
        by_head = self._reshape(self._value(x), [0, 0, shape[2], shape[3]], node.name + "_by_head")
        normed = self._norm(by_head, scale, node.name + "_normed", eps)
        return self._reshape(normed, [0, 0, shape[2] * shape[3]], node.name)

    def _norm(self, x: str, weight: str, name: str, eps: float) -> str:
        return self.file.call("RMSNormalization", [x, weight], name, axis=-1, epsilon=eps)

    def _attention(self, node: Node, q: Node, k: Node, v: Node, start: Node, scale: float) -> str:
        """Rotary, the cache's update and attention in one; q, k and v as one tensor where they are one."""
        parts: Any = [self.values[x] for x in (q, k, v)]
        packed = all(isinstance(part, _Part) for part in parts) and [part.index for part in parts] == [
            0,
            1,
            2,
        ]
        tensors = [parts[0].value, "", ""] if packed else [self._value(x) for x in (q, k, v)]
        layer = self.caches.index(k.args[0]) // 2  # type: ignore[arg-type]
        kinds = [f"{layer}.{kind}" for kind in CACHES]
        self.file.calls(
            f"{MICROSOFT}:GroupQueryAttention",
            [*tensors, *(PAST + kind for kind in kinds), *LENGTHS, "cos", "sin"],
            [node.name, *(PRESENT + kind for kind in kinds)],
            num_heads=self.dims.heads,
            kv_num_heads=self.dims.kv_heads,
            do_rotary=1,
            scale=float(scale),
        )
        return self._read(node.name) if node is self.last_attention else node.name

    def _silu(self, node: Node, x: Node) -> str:
        return self.file.call(f"{MICROSOFT}:QuickGelu", [self._value(x)], node.name, alpha=1.0)

    def _mul(self, node: Node, a: Any, b: Any) -> str | None:
        """Rotary's own arithmetic has no values here: the runtime reads the tables."""
        if a in self.values and b in self.values:
            return self.file.call("Mul", [self._value(a), self._value(b)], node.name)
        return None

    def _add(self, node: Node, a: Any, b: Any) -> str | None:
        """A sum and the norm that reads it are one operator."""
        import torch

        if a not in self.values or b not in self.values:
            return None
        norms = [user for user in node.users if user.target == torch.ops.mobile.rms_norm.default]
        if len(norms) != 1:
            return self.file.call("Add", [self._value(a), self._value(b)], node.name)
        weight: Any = norms[0].args[1]
        eps = norms[0].args[2]
        outputs = [norms[0].name] if len(node.users) == 1 else [norms[0].name, "", "", node.name]
        self.file.calls(
            f"{MICROSOFT}:SkipSimplifiedLayerNormalization",
            [self._value(a), self._value(b), self._weight(str(weight.target), self._array(weight))],
            outputs,
            epsilon=eps,
        )
        self._set(norms[0], norms[0].name)
        return node.name

    def _set(self, node: Node, value: str | _Part) -> None:
        self.values[node] = value
        if self.last_attention in self.values:
            self.cut.add(node)

    def _value(self, node: Node) -> str:
        """What a node computes; after the last attention, at the read positions only."""
        if node not in self.values:
            raise ExportError(f"ONNX has no form for {self._formless(node)}", "report the model's name to us")
        value = self.values[node]
        if isinstance(value, _Part):
            value = self._split(value)
        if self.last_attention in self.values and node not in self.cut:
            value = self._read(value)
            self._set(node, value)
        return value

    def _formless(self, node: Node) -> Any:
        """The op at which the way to a node without a value begins."""
        forms = self._forms()
        while node.target in forms:
            missing = [one for one in node.all_input_nodes if one not in self.values]
            if not missing:
                break
            node = missing[0]
        return node.target

    def _read(self, value: str) -> str:
        """The rows at `positions`: the last layer's MLP and the head compute no others."""
        return self.file.call("Gather", [value, READ], value + "_read", axis=1)

    def _split(self, part: _Part) -> str:
        names = [f"{part.value}_{index}" for index in range(len(part.sizes))]
        if names[0] not in self.file.made:
            sizes = self.file.constant(f"sizes_{'_'.join(map(str, part.sizes))}", part.sizes, "int64")
            self.file.calls("Split", [part.value, sizes], names, axis=-1)
        return names[part.index]

    def _reshape(self, value: str, shape: list[int], name: str) -> str:
        target = self.file.constant(f"shape_{'_'.join(map(str, shape))}", shape, "int64")
        return self.file.call("Reshape", [value, target], name)

    def _weight(self, name: str, array: np.ndarray) -> str:
        return self.file.weight(name, lambda: array)

    def _array(self, node: Node) -> np.ndarray:
        return tensor_of(self.module, node).detach().numpy()
