"""The dialect written in ExecuTorch's operators: what XNNPACK fuses, and what the runtime's LLM kernels do.

Everything between two attentions is shaped so that XNNPACK takes it as ONE partition: a mean and a
half rotation are small matrix products (exact: each sums one term, or a row of equal weights), and
every view infers its single dynamic dimension.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from mobile_export.rewrite import editable, rotary_tables, tensor_of, tidy
from mobile_export.targets.executorch_mlp import split_mlps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from mobile_export.recipe import ExecuTorch as Options
    from mobile_export.types import Dims, Program


def executorch_module(program: Program, options: Options) -> torch.nn.Module:
    """A module `(tokens int64 [1, S], start int64 [1]) -> logits fp32 [1, 1, vocab]` holding its KV cache.

    Logits are those of the last position.
    """
    import torch

    body = _Lowering(program, options).run()
    dims = program.dims

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body
            for index in range(2 * dims.layers):
                for part, (width, dtype) in _cache_parts(options, dims).items():
                    state = torch.zeros(1, dims.context, dims.kv_heads, width, dtype=dtype)
                    self.register_buffer(f"{part}_{index}", state, persistent=False)

        def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
            position = start.item()
            torch._check(position >= 0)
            torch._check(position + tokens.shape[1] <= dims.context)
            caches = [
                getattr(self, f"{part}_{index}")
                for part in _cache_parts(options, dims)
                for index in range(2 * dims.layers)
            ]
            return self.body(tokens, start, *caches, position)

    return WithCache()


def _cache_parts(options: Options, dims: Dims) -> dict[str, tuple[int, torch.dtype]]:
    """What a KV cache is made of: last dimension and dtype by name, of [1, context, kv_heads, _]."""
    import torch

    if options.kv_cache != "int8":
        dtype = torch.float16 if options.kv_cache == "fp16" else torch.float32
        return {"cache": (dims.head_dim, dtype)}
    return {"cache": (dims.head_dim, torch.int8), "scales": (1, torch.float32), "zeros": (1, torch.int8)}


class _Lowering:
    """Rewrites one program's graph, op by op."""

    def __init__(self, program: Program, options: Options) -> None:
        import torch

        self.module: GraphModule = editable(program.exported)
        self.graph = self.module.graph
        self.graph.set_codegen(torch.fx.graph.CodeGen())  # flat arguments: one more follows
        self.aten = torch.ops.aten
        caches = self.graph.find_nodes(op="placeholder")[2:]
        self.extra = {
            part: {cache: self._placeholder(f"{part}_{cache.name}") for cache in caches}
            for part in _cache_parts(options, program.dims)
            if part != "cache"
        }
        self.half, self.parts = options.kv_cache == "fp16", options.mlp_parts
        self.position = self._placeholder("position")
        self.cos, self.sin = self._rotary_rows(*rotary_tables(program))
        self.quantized: dict[Node, Node] = {}

    def run(self) -> GraphModule:
        """The rewritten module `(tokens, start, *caches, position) -> logits`."""
        output: Any = self.graph.output_node()
        output.args = (output.args[0][0],)
        self._keep_last(output.args[0])
        split_mlps(self.module, self.parts)
        forms = self._forms()
        for node in list(self.graph.nodes):
            form = forms.get(node.target)
            if form is not None:
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(form(node, *node.args))
                self.graph.erase_node(node)
        self._cancel_transposes()
        tidy(self.module)
        return self.module

    def _forms(self) -> dict[Any, Any]:
        import torch

        mobile = torch.ops.mobile
        return {
            mobile.linear_int8.default: self._linear,
            mobile.embedding_int8.default: self._embedding,
            mobile.rms_norm.default: self._rms_norm,
            mobile.rotary.default: self._rotary,
            mobile.update_cache.default: self._update_cache,
            mobile.attention.default: self._attention,
            self.aten.view.default: self._view,
            self.aten.reshape.default: self._view,
            self.aten._assert_tensor_metadata.default: lambda node, *_: None,
        }

    def _linear(self, node: Node, x: Node, codes: Node, scales: Node, bias: Node | None) -> Node:
        """int8 codes times activations quantized per token at run time: XNNPACK's qd8-f32-qc8w."""
        import torch

        channels = tensor_of(self.module, scales).shape[0]
        zeros = self._constant(f"zeros_{channels}", torch.zeros(channels, dtype=torch.int64))
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        weight = self._call(dequantize, codes, scales, zeros, 0, -127, 127, torch.int8)
        return self._call(self.aten.linear.default, self._dynamic(x), weight, bias)

    def _dynamic(self, x: Node) -> Node:
        """x through per-token int8 and back, once for all the linears that read it."""
        import torch

        if x not in self.quantized:
            q = torch.ops.quantized_decomposed
            chosen = self._call(q.choose_qparams_per_token_asymmetric.default, x, torch.int8)
            scale, zero = (self._call(operator.getitem, chosen, index) for index in (0, 1))
            limits = (-128, 127, torch.int8)
            codes = self._call(q.quantize_per_token.default, x, scale, zero, *limits)
            back = self._call(q.dequantize_per_token.default, codes, scale, zero, *limits, torch.float32)
            self.quantized[x] = back
        return self.quantized[x]

    def _embedding(self, node: Node, ids: Node, codes: Node, scales: Node) -> Node:
        import torch

        embedding = torch.ops.quantized_decomposed.embedding_byte.default
        return self._call(embedding, codes, scales, None, -127, 127, ids)

    def _rms_norm(self, node: Node, x: Node, weight: Node, eps: float) -> Node:
        import torch

        width = tensor_of(self.module, weight).shape[0]
        row = self._constant(f"mean_{width}", torch.full((1, width), 1.0 / width))
        mean = self._call(self.aten.linear.default, self._call(self.aten.mul.Tensor, x, x), row)
        factor = self._call(self.aten.rsqrt.default, self._call(self.aten.add.Tensor, mean, eps))
        unit = self._call(self.aten.mul.Tensor, x, factor)
        if bool((tensor_of(self.module, weight) == 1).all()):
            return unit
        return self._call(self.aten.mul.Tensor, unit, weight)

    def _rotary(self, node: Node, x: Node, cos: Node, sin: Node) -> Node:
        import torch

        width = node.meta["val"].shape[-1]
        half = torch.eye(width // 2)
        zero = torch.zeros_like(half)
        turn = torch.cat((torch.cat((zero, -half), 1), torch.cat((half, zero), 1)), 0)
        x = self._swap_heads(x)
        turned = self._call(self.aten.linear.default, x, self._constant(f"rotate_half_{width}", turn))
        by_cos = self._call(self.aten.mul.Tensor, x, self.cos)
        by_sin = self._call(self.aten.mul.Tensor, turned, self.sin)
        return self._swap_heads(self._call(self.aten.add.Tensor, by_cos, by_sin))

    def _update_cache(self, node: Node, cache: Node, new: Node, start: Node) -> Node:
        import torch

        new = self._swap_heads(new)
        parts = {cache: self._half(new)}
        if self.extra:
            codes, scales, zeros = self._per_token(new)
            parts = {cache: codes, self.extra["scales"][cache]: scales, self.extra["zeros"][cache]: zeros}
        for state, value in parts.items():
            self._call(torch.ops.llama.update_cache.default, value, state, self.position)
        return cache

    def _attention(self, node: Node, q: Node, k: Node, v: Node, start: Node, scale: float) -> Node:
        import torch

        q = self._swap_heads(q)
        how = (self.position, None, 0.0, True, scale)
        if not self.extra:
            out = self._call(torch.ops.llama.custom_sdpa.default, self._half(q), k, v, *how)
            return self._swap_heads(self._call(self.aten.to.dtype, out, torch.float32) if self.half else out)
        codes, scales, zeros = self._per_token(q)
        of_cache = [self.extra[part][cache] for cache in (k, v) for part in ("zeros", "scales")]
        sdpa = torch.ops.llama.custom_quantized_sdpa.default
        return self._swap_heads(self._call(sdpa, codes, k, v, *how, zeros, scales, *of_cache))

    def _half(self, x: Node) -> Node:
        """x in the dtype of a float KV cache."""
        import torch

        return self._call(self.aten.to.dtype, x, torch.float16) if self.half else x

    def _per_token(self, x: Node) -> tuple[Node, Node, Node]:
        """int8 codes of x [1, S, H, D] with fp32 scales and int8 zero points [1, S, H, 1]."""
        import torch

        q = torch.ops.quantized_decomposed
        chosen = self._call(q.choose_qparams_per_token_asymmetric.default, x, torch.int8)
        scale, zero = (self._call(operator.getitem, chosen, index) for index in (0, 1))
        codes = self._call(q.quantize_per_token.default, x, scale, zero, -128, 127, torch.int8)
        to = self.aten.to.dtype
        return codes, self._call(to, scale, torch.float32), self._call(to, zero, torch.int8)

    def _view(self, node: Node, x: Node, shape: list[Any]) -> Node:
        """XNNPACK reshapes one dynamic dimension, if the shape leaves it to be inferred."""
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        return self._call(self.aten.view.default, x, sizes)

    def _keep_last(self, logits: Node) -> None:
        """Compute the head for the last position only: nobody reads the others."""
        head_input: Any = logits.args[0]
        while head_input.target != self._target("mobile.rms_norm"):
            head_input = head_input.args[0]
        hidden = head_input.args[0]
        with self.graph.inserting_before(head_input):
            last = self._call(self.aten.unsqueeze.default, self._call(self.aten.select.int, hidden, 1, -1), 1)
        head_input.args = (last, *head_input.args[1:])

    def _cancel_transposes(self) -> None:
        for node in list(self.graph.nodes):
            if self._swaps(node) and self._swaps(node.args[0]):
                node.replace_all_uses_with(node.args[0].args[0])

    def _swaps(self, node: Node) -> bool:
        return node.target == self.aten.transpose.int and tuple(node.args[1:]) == (1, 2)

    def _swap_heads(self, x: Node) -> Node:
        """[1, H, S, D] <-> [1, S, H, D]: the dialect's layout and the runtime's."""
        return self._call(self.aten.transpose.int, x, 1, 2)

    def _rotary_rows(self, *tables: Tensor) -> list[Node]:
        """Rows [start, start + S) of each table [context, D] as [1, S, 1, D], looked up once a forward."""
        tokens, start = self.graph.find_nodes(op="placeholder")[:2]
        rows = []
        with self.graph.inserting_after(self.position):
            here = self.graph.call_function(self.aten.sym_size.int, (tokens, 1))
        with self.graph.inserting_before(here.next):
            positions = self._call(self.aten.add.Tensor, self._call(self.aten.arange.default, here), start)
            for name, table in zip(("rotary_cos", "rotary_sin"), tables, strict=True):
                row = self._call(self.aten.embedding.default, self._constant(name, table), positions)
                row = self._call(self.aten.unsqueeze.default, row, 0)
                rows.append(self._call(self.aten.unsqueeze.default, row, 2))
        return rows

    def _constant(self, name: str, value: Tensor) -> Node:
        if not hasattr(self.module, name):
            self.module.register_buffer(name, value)
        return self.graph.get_attr(name)

    def _call(self, target: Any, *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def _placeholder(self, name: str) -> Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            return self.graph.placeholder(name)

    @staticmethod
    def _target(name: str) -> Any:
        import torch

        namespace, op = name.split(".")
        return getattr(getattr(torch.ops, namespace), op).default
