"""Quantize: each linear and the embedding become int8 codes with one scale per output channel.

Or, with `quantize.weights = "int4"`, each linear but the head 4-bit codes with a scale per group.

The codes are computed here and nowhere else: every target carries them bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.passes.calibrate import calibrate, texts
from mobile_export.passes.rounding import (
    INT4,
    INT8,
    Factor,
    compensated,
    quantize_per_channel,
    quantize_per_group,
)
from mobile_export.passes.trace import op_counts
from mobile_export.rewrite import tensor_of
from mobile_export.types import Program

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

    from mobile_export.recipe import Recipe


class Quantize:
    """fp32 Program -> Program with int8 or int4 weights; a tied embedding and head share one set of codes."""

    name = "quantize"
    reads = ("quantize",)
    data = ("calibration.toml",)

    def run(self, program: Program, recipe: Recipe) -> Program:
        """Replace every `aten.linear` and `aten.embedding` by its int8 form; with int4 all other linears than
        the head by theirs.

        `quantize.rounding = "compensated"` needs the program's source, for its tokenizer.
        With `quantize.weights = "fp32"` nothing changes. ExportError: groups do not divide a width.
        """
        import torch

        from mobile_export.rewrite import editable, reexport, swap

        if recipe.quantize.weights == "fp32":
            return replace(program, passes=(*program.passes, self.name))
        module = editable(program.exported)
        group = recipe.quantize.group_size if recipe.quantize.weights == "int4" else None
        if group:
            _refuse_widths(module, group)
        factors = _factors(module, program) if recipe.quantize.rounding == "compensated" else {}
        codes = _CodeBook(module, factors)
        for node in list(module.graph.nodes):
            if node.target == torch.ops.aten.linear.default:
                x, weight, *bias = node.args
                size = None if _is_head(node) else group
                op = torch.ops.mobile.linear_int4 if size else torch.ops.mobile.linear_int8
                swap(node, op.default, (x, *codes.of(weight, size), bias[0] if bias else None))
            elif node.target == torch.ops.aten.embedding.default:
                weight, ids = node.args[:2]
                swap(node, torch.ops.mobile.embedding_int8.default, (ids, *codes.of(weight)))
        return Program(reexport(module, program), program.dims, (*program.passes, self.name))

    def check(self, program: Program, recipe: Recipe) -> None:
        """No float matrix is left, codes stay in range, scales are finite and not 0, of int8 positive."""
        import torch

        if recipe.quantize.weights == "fp32":
            return
        counts = op_counts(program.exported)
        if counts.get("aten.linear", 0) or counts.get("aten.embedding", 0):
            raise ExportError("quantize left a float linear or embedding", "report the model's name to us")
        state = program.exported.state_dict
        for name, tensor in state.items():
            if name.endswith("_codes"):
                low, high = INT4 if state[name.removesuffix("_codes") + "_scales"].dim() == 2 else INT8
                ok = tensor.dtype == torch.int8 and low <= int(tensor.min()) <= int(tensor.max()) <= high
            elif name.endswith("_scales"):
                usable = tensor != 0 if tensor.dim() == 2 else tensor > 0
                ok = bool(torch.isfinite(tensor).all()) and bool(usable.all())
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


def _is_head(linear: Node) -> bool:
    return all(user.op == "output" for user in linear.users)


def _refuse_widths(module: GraphModule, group: int) -> None:
    import torch

    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        width = tensor_of(module, node.args[1]).shape[1]
        if width % group and not _is_head(node):
            raise ExportError(
                f"groups of {group} columns do not divide the {width} of '{node.args[1].target}'",
                "set another quantize.group_size in the recipe",
            )


class _CodeBook:
    """Codes and scales of each weight of a module, made once a weight: tied weights get one pair."""

    def __init__(self, module: GraphModule, factors: dict[int, list[Factor | None]]) -> None:
        self.module, self.factors = module, factors
        self.known: dict[int, tuple[str, str]] = {}

    def of(self, node: Node, group: int | None = None) -> tuple[Node, Node]:
        """Two attribute nodes (codes, scales), placed where a weight's own `node` is; int4 with `group`."""
        name = str(node.target)
        tensor = tensor_of(self.module, node)
        key = tensor.data_ptr()
        if key not in self.known:
            base = name.replace(".", "_").removesuffix("_weight")
            self.known[key] = (f"{base}_codes", f"{base}_scales")
            weight, factors = tensor.detach(), self.factors.get(key)
            if factors:
                made = compensated(weight, factors, group)
            else:
                made = quantize_per_group(weight, group) if group else quantize_per_channel(weight)
            for attribute, value in zip(self.known[key], made, strict=True):
                self.module.register_buffer(attribute, value)
        graph: Graph = self.module.graph
        with graph.inserting_before(node):
            codes, scales = (graph.get_attr(attribute) for attribute in self.known[key])
        return codes, scales
