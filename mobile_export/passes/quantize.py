"""Quantize: each linear and the embedding become int8 codes with one scale per output channel.

The codes are computed here and nowhere else: every target carries them bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.passes.calibrate import calibrate, texts
from mobile_export.passes.rounding import Factor, compensated, quantize_per_channel
from mobile_export.passes.trace import op_counts
from mobile_export.rewrite import tensor_of
from mobile_export.types import Program

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

    from mobile_export.recipe import Recipe


class Quantize:
    """fp32 Program -> Program with int8 weights; a tied embedding and head share one set of codes."""

    name = "quantize"
    reads = ("quantize",)
    data = ("calibration.toml",)

    def run(self, program: Program, recipe: Recipe) -> Program:
        """Replace every `aten.linear` and `aten.embedding` by its int8 form.

        `quantize.rounding = "compensated"` needs the program's source, for its tokenizer.
        With `quantize.weights = "fp32"` nothing changes.
        """
        import torch

        from mobile_export.rewrite import editable, reexport, swap

        if recipe.quantize.weights == "fp32":
            return replace(program, passes=(*program.passes, self.name))
        module = editable(program.exported)
        factors = _factors(module, program) if recipe.quantize.rounding == "compensated" else {}
        codes = _CodeBook(module, factors)
        for node in list(module.graph.nodes):
            if node.target == torch.ops.aten.linear.default:
                x, weight, *bias = node.args
                args = (x, *codes.of(weight), bias[0] if bias else None)
                swap(node, torch.ops.mobile.linear_int8.default, args)
            elif node.target == torch.ops.aten.embedding.default:
                weight, ids = node.args[:2]
                swap(node, torch.ops.mobile.embedding_int8.default, (ids, *codes.of(weight)))
        return Program(reexport(module, program), program.dims, (*program.passes, self.name))

    def check(self, program: Program, recipe: Recipe) -> None:
        """No float matrix is left, codes stay in [-127, 127], scales are finite and positive."""
        import torch

        if recipe.quantize.weights == "fp32":
            return
        counts = op_counts(program.exported)
        if counts.get("aten.linear", 0) or counts.get("aten.embedding", 0):
            raise ExportError("quantize left a float linear or embedding", "report the model's name to us")
        for name, tensor in program.exported.state_dict.items():
            if name.endswith("_codes"):
                ok = tensor.dtype == torch.int8 and int(tensor.min()) >= -127
            elif name.endswith("_scales"):
                ok = bool(torch.isfinite(tensor).all()) and bool((tensor > 0).all())
            else:
                ok = tensor.dim() < 2
            if not ok:
                raise ExportError(f"quantize made unusable values in '{name}'", "check the source weights")


def _factors(module: GraphModule, program: Program) -> dict[int, list[Factor | None]]:
    """By the address of each weight that a linear reads; weights that read one input share a list."""
    import torch

    if program.source is None:
        raise ValueError("a program without a source cannot be calibrated")
    found = calibrate(module, program.dims, texts(program.source, program.dims.context))
    made = {}
    for node in list(found):
        made[node] = found.pop(node).factors()  # the moments go as the factors come: both are large
    return {
        tensor_of(module, node.args[1]).data_ptr(): made[node.args[0]]
        for node in module.graph.nodes
        if node.target == torch.ops.aten.linear.default
    }


class _CodeBook:
    """Codes and scales of each weight of a module, made once a weight: tied weights get one pair."""

    def __init__(self, module: GraphModule, factors: dict[int, list[Factor | None]]) -> None:
        self.module, self.factors = module, factors
        self.known: dict[int, tuple[str, str]] = {}

    def of(self, node: Node) -> tuple[Node, Node]:
        """Two attribute nodes (codes, scales), placed where a weight's own `node` is."""
        name = str(node.target)
        tensor = tensor_of(self.module, node)
        key = tensor.data_ptr()
        if key not in self.known:
            base = name.replace(".", "_").removesuffix("_weight")
            self.known[key] = (f"{base}_codes", f"{base}_scales")
            weight, factors = tensor.detach(), self.factors.get(key)
            made = compensated(weight, factors) if factors else quantize_per_channel(weight)
            for attribute, value in zip(self.known[key], made, strict=True):
                self.module.register_buffer(attribute, value)
        graph: Graph = self.module.graph
        with graph.inserting_before(node):
            codes, scales = (graph.get_attr(attribute) for attribute in self.known[key])
        return codes, scales
