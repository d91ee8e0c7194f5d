"""The dialect written in MIL, Core ML's operators: functions of one length each share weights and state.

fp16 throughout, as the Neural Engine and the GPU compute; written directly, so that every op has a
name that says its layer and no pass of a converter decides what the package holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mobile_export.rewrite import editable, rotary_tables, tensor_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from mobile_export.types import Program

STATES = ("key_cache", "value_cache")
LOGITS = "logits"


class Functions:
    """Makes MIL functions of one program; a weight has one id in all of them, and is stored once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.module: GraphModule = editable(program.exported)
        cos, sin = (table.numpy() for table in rotary_tables(program))
        half = sin.shape[1] // 2  # the other half is the same
        self.tables = {"rotary_cos": cos[:, :half], "rotary_sin": sin[:, :half]}
        self.consts: dict[str, np.ndarray] = {}

    def make(self, length: int | None, *, every: bool) -> Any:
        """`(tokens int32 [1, length], start int32 [1], last int32 [1]) -> logits fp16 [1, 1, vocab]`.

        `last` is the position of `tokens` whose logits are wanted: absent when there is but one, or
        with `every`, where logits are [1, length, vocab]. With no length, tokens may be any number up
        to the context, and `last` any number of positions.
        """
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, get_new_symbol, types

        dims = self.program.dims
        cache = (dims.layers, dims.kv_heads, dims.context, dims.head_dim)
        shapes: dict[str, tuple[Any, ...]] = {"tokens": (1, length), "start": (1,)}
        if length is None:
            several = ct.RangeDim(1, dims.context, default=1)
            shapes |= {"tokens": (1, several), "last": (several,)}
        elif length > 1 and not every:
            shapes["last"] = (1,)
        specs = {
            name: mb.placeholder(
                [size if isinstance(size, int) else get_new_symbol(f"{name}_length") for size in shape],
                types.int32,
            )
            for name, shape in shapes.items()
        }
        specs |= {name: mb.state_tensor_placeholder(cache, types.fp16) for name in STATES}
        mb.name_count.clear()  # it numbers the small constants, over all that this process ever built
        with Function(specs, opset_version=ct.target.iOS18) as function:
            logits = _Writer(self, function.inputs, length).run()
            function.set_outputs([logits])
        shapes |= dict.fromkeys(STATES, cache)
        function.set_input_types(tuple(ct.TensorType(name=name, shape=shapes[name]) for name in specs))
        return function

    def value(self, name: str, make: Callable[[], Tensor | np.ndarray], dtype: str) -> np.ndarray:
        """A constant's array, made once."""
        import numpy as np

        if name not in self.consts:
            self.consts[name] = np.ascontiguousarray(np.asarray(make()).astype(dtype))
        return self.consts[name]


class _Writer:
    """Writes one function, node by node."""

    def __init__(self, functions: Functions, inputs: dict[str, Any], length: int | None) -> None:
        from coremltools.converters.mil import Builder as mb

        self.mb, self.functions, self.inputs, self.length = mb, functions, inputs, length
        self.dims, self.module = functions.program.dims, functions.module
        self.layer = ""
        self.names: dict[str, int] = {}
        self.made: dict[str, Any] = {}
        self.values: dict[Node, Any] = {}

    def run(self) -> Any:
        """The logits."""
        graph = self.module.graph
        output: Any = graph.output_node()
        head = output.args[0][0]
        norm: Any = head
        while norm.target != self._mobile("rms_norm"):
            norm = norm.args[0]
        self._positions()
        placeholders = graph.find_nodes(op="placeholder")
        self.values = {placeholders[0]: self.inputs["tokens"]}
        self.slots = {node: divmod(index, 2) for index, node in enumerate(placeholders[2:])}
        self.caches = [
            self.mb.read_state(input=self.inputs[name], name=self._name(f"{name}_read")) for name in STATES
        ]
        forms = self._forms()
        for node in graph.nodes:
            if node.op != "call_function" or node.target not in forms:
                continue
            self._enter(node)
            if node is norm:
                self.layer = ""
                if "last" in self.inputs:
                    x = self.values[node.args[0]]
                    last = self.mb.gather(x=x, indices=self.inputs["last"], axis=1, name=self._name("last"))
                    self.values[node.args[0]] = last
            self.values[node] = forms[node.target](node, *node.args)
        return self.mb.identity(x=self.values[head], name=LOGITS)

    def _forms(self) -> dict[Any, Any]:
        import torch

        aten = torch.ops.aten
        return {
            self._mobile("linear_int8"): self._linear,
            self._mobile("embedding_int8"): self._embedding,
            self._mobile("rms_norm"): self._rms_norm,
            self._mobile("rotary"): self._rotary,
            self._mobile("update_cache"): self._update_cache,
            self._mobile("attention"): self._attention,
            aten.view.default: self._view,
            aten.reshape.default: self._view,
            aten.transpose.int: self._transpose,
            aten.silu.default: lambda node, x: self._op("silu", "silu", x=self._of(x)),
            aten.add.Tensor: lambda node, x, y: self._both("add", x, y),
            aten.mul.Tensor: lambda node, x, y: self._both("mul", x, y),
        }

    def _positions(self) -> None:
        """Rows of the rotary tables; and what each query sees, bool [1, 1, groups * S, context]."""
        import numpy as np

        here: Any = np.arange(self.length or 0, dtype=np.int32)
        self.count: Any = np.int32(self.length or 0)
        if self.length is None:
            sizes = self._op("shape", "tokens_shape", x=self.inputs["tokens"])
            self.count = self._op("gather", "tokens_count", x=sizes, indices=np.int32(1), axis=0)
            here = self._op("range_1d", "tokens_range", start=np.int32(0), end=self.count, step=np.int32(1))
        positions = self._op("add", "positions", x=self.inputs["start"], y=here)
        cos, sin = (
            self._op("gather", f"{name}_rows", x=self._table(name), indices=positions, axis=0)
            for name in self.functions.tables
        )
        minus = self._op("mul", "rotary_sin_minus", x=sin, y=np.float16(-1))  # of the half turned in
        self.rows = [
            self._op("concat", "rotary_cos_both", values=[cos, cos], axis=-1),
            self._op("concat", "rotary_sin_both", values=[minus, sin], axis=-1),
        ]
        groups = self.dims.heads // self.dims.kv_heads
        queries = self._op("tile", "query_positions", x=positions, reps=[groups])
        queries = self._op("expand_dims", "query_column", x=queries, axes=[0, 1, 3])
        keys = np.arange(self.dims.context, dtype=np.int32).reshape(1, 1, 1, -1)
        self.mask = self._op(
            "less_equal", "causal_mask", x=self._const("keys", lambda: keys, "int32"), y=queries
        )

    def _linear(self, node: Node, x: Node, codes: Node, scales: Node, bias: Node | None) -> Any:
        added = (
            self._attribute(bias)
            if bias is not None
            else self._zeros(tensor_of(self.module, scales).shape[0])
        )
        what = _base(codes)
        return self._op("linear", what, x=self._of(x), weight=self._weight(codes, scales), bias=added)

    def _embedding(self, node: Node, ids: Node, codes: Node, scales: Node) -> Any:
        weight = self._weight(codes, scales)
        return self._op("gather", "embedding", x=weight, indices=self._of(ids), axis=0)

    def _rms_norm(self, node: Node, x: Node, weight: Node, eps: float) -> Any:
        """`y = x / m; y * rsqrt(mean(y^2) + eps / m^2) * w` with m = max(max|x|, sqrt(eps)).

        The same number for any m, and no square is above 1: x * x alone leaves fp16's range.
        """
        import numpy as np

        root = np.float16(math.sqrt(eps))
        value, what = self._of(x), _base(weight)
        size = self._op("abs", f"{what}_abs", x=value)
        size = self._op("reduce_max", f"{what}_max", x=size, axes=[-1], keep_dims=True)
        size = self._op("maximum", f"{what}_size", x=size, y=root)
        scaled = self._op("real_div", f"{what}_scaled", x=value, y=size)
        squares = self._op("mul", f"{what}_squares", x=scaled, y=scaled)
        mean = self._op("reduce_mean", f"{what}_mean", x=squares, axes=[-1], keep_dims=True)
        floor = self._op("real_div", f"{what}_root", x=root, y=size)
        floor = self._op("mul", f"{what}_floor", x=floor, y=floor)
        power = self._op("add", f"{what}_power", x=mean, y=floor)
        factor = self._op("rsqrt", f"{what}_rsqrt", x=power)
        if bool((tensor_of(self.module, weight) == 1).all()):
            return self._op("mul", what, x=scaled, y=factor)
        unit = self._op("mul", f"{what}_unit", x=scaled, y=factor)
        return self._op("mul", what, x=unit, y=self._attribute(weight))

    def _rotary(self, node: Node, x: Node, cos: Node, sin: Node) -> Any:
        value = self._of(x)
        low, high = self._op("split", "rotary_halves", x=value, num_splits=2, axis=-1)
        turned = self._op("concat", "rotary_turned", values=[high, low], axis=-1)
        by_cos = self._op("mul", "rotary_by_cos", x=value, y=self.rows[0])
        by_sin = self._op("mul", "rotary_by_sin", x=turned, y=self.rows[1])
        return self._op("add", "rotary", x=by_cos, y=by_sin)

    def _update_cache(self, node: Node, cache: Node, new: Node, start: Node) -> Any:
        """The layer's own keys or values after `new` [1, kv_heads, S, head_dim] went in."""
        import numpy as np

        dims, (layer, which) = self.dims, self.slots[cache]
        name = STATES[which]
        first = self.inputs["start"]
        begin = [np.array([layer, 0], np.int32), first, np.array([0], np.int32)]
        end = self._op("add", f"{name}_end", x=first, y=self.count)
        ends = [np.array([layer + 1, dims.kv_heads], np.int32), end, np.array([dims.head_dim], np.int32)]
        bounds = [
            self._op("concat", f"{name}_{what}", values=values, axis=0)
            for what, values in (("from", begin), ("to", ends))
        ]
        whole = self._op(
            "slice_update",
            f"{name}_update",
            x=self.caches[which],
            update=self._of(new),
            begin=bounds[0],
            end=bounds[1],
        )
        state = self.inputs[name]
        self.caches[which] = self._op("coreml_update_state", f"{name}_state", state=state, value=whole)
        return self._op(
            "slice_by_index",
            f"{name}_layer",
            x=self.caches[which],
            begin=[layer, 0, 0, 0],
            end=[layer + 1, dims.kv_heads, dims.context, dims.head_dim],
        )

    def _attention(self, node: Node, q: Node, k: Node, v: Node, start: Node, scale: float) -> Any:
        """Query heads that share keys are folded into the length: no key is repeated."""
        import numpy as np

        dims, query = self.dims, self._of(q)
        natural = 1 / math.sqrt(dims.head_dim)
        if not math.isclose(scale, natural, rel_tol=1e-6):
            query = self._op("mul", "query_scaled", x=query, y=np.float16(scale / natural))
        folded = [1, dims.kv_heads, -1, dims.head_dim]
        query = self._op("reshape", "query_folded", x=query, shape=folded)
        out = self._op(
            "scaled_dot_product_attention",
            "attention",
            query=query,
            key=self._of(k),
            value=self._of(v),
            attn_mask=self.mask,
        )
        whole = [1, dims.heads, -1, dims.head_dim]
        return self._op("reshape", "attention_heads", x=out, shape=whole)

    def _view(self, node: Node, x: Node, shape: Any) -> Any:
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        return self._op("reshape", "view", x=self._of(x), shape=sizes)

    def _transpose(self, node: Node, x: Node, one: int, other: int) -> Any:
        value = self._of(x)
        order = list(range(len(value.shape)))
        order[one], order[other] = order[other], order[one]
        return self._op("transpose", "transpose", x=value, perm=order)

    def _both(self, op: str, x: Node, y: Node) -> Any:
        values = [self.values.get(one) for one in (x, y)]
        if None in values:
            return None  # of positions and tables, which `_positions` makes
        return self._op(op, {"add": "residual", "mul": "gated"}[op], x=values[0], y=values[1])

    def _weight(self, codes: Node, scales: Node) -> Any:
        """One `constexpr_blockwise_shift_scale` for each pair: codes int8 [N, K], scales fp16 [N, 1]."""
        name = str(codes.target)
        if name not in self.made:
            data = self._const(name, lambda: tensor_of(self.module, codes), "int8")
            scale = self._const(
                str(scales.target), lambda: tensor_of(self.module, scales).detach()[:, None], "float16"
            )
            weight = name.removesuffix("_codes").removeprefix("backbone_")
            self.made[name] = self.mb.constexpr_blockwise_shift_scale(
                data=data, scale=scale, name=f"{weight}_weight"
            )
        return self.made[name]

    def _attribute(self, node: Node) -> Any:
        name = str(node.target).replace(".", "_")
        return self._const(name, lambda: tensor_of(self.module, node).detach(), "float16")

    def _zeros(self, size: int) -> Any:
        """A bias of its own, shared: the one that `linear` makes is stored for each layer and function."""
        import numpy as np

        return self._const(f"zeros_{size}", lambda: np.zeros(size), "float16")

    def _table(self, name: str) -> Any:
        return self._const(name, lambda: self.functions.tables[name], "float16")

    def _const(self, name: str, make: Callable[[], Any], dtype: str) -> Any:
        if name not in self.made:
            value = self.functions.value(name, make, dtype)
            self.made[name] = self.mb.const(val=value, name=name.removeprefix("backbone_"))
            self.made[name].op.weight_id = name
        return self.made[name]

    def _of(self, node: Node) -> Any:
        return self.values[node]

    def _op(self, op: str, what: str, **arguments: Any) -> Any:
        return getattr(self.mb, op)(**arguments, name=self._name(what))

    def _name(self, what: str) -> str:
        """`what` of the layer at hand, with a number when it is not the first."""
        base = what if not self.layer or what.startswith("layers_") else f"{self.layer}_{what}"
        count = self.names[base] = self.names.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"

    def _enter(self, node: Node) -> None:
        """The layer is that of the last weight in the order of the program."""
        for argument in node.args:
            target = str(getattr(argument, "target", ""))
            if found := re.search(r"layers[._](\d+)", target):
                self.layer = f"layers_{found.group(1)}"

    @staticmethod
    def _mobile(name: str) -> Any:
        import torch

        return getattr(torch.ops.mobile, name).default


def _base(node: Node) -> str:
    """`layers_3_mlp_down_proj` of its codes, `norm` of the last norm's weight."""
    name = str(node.target).replace(".", "_").removeprefix("backbone_")
    return name.removesuffix("_codes").removesuffix("_weight")
