"""Quantize: each linear and the embedding become int8 codes with one scale per output channel.

The codes are computed here and nowhere else: every target carries them bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_export.errors import ExportError
from mobile_export.passes.trace import op_counts
from mobile_export.rewrite import tensor_of
from mobile_export.types import Program

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Graph, GraphModule, Node

    from mobile_export.recipe import Recipe


class Quantize:
    """fp32 Program -> Program with int8 weights; a tied embedding and head share one set of codes."""

    name = "quantize"
    reads = ("quantize",)

    def run(self, program: Program, recipe: Recipe) -> Program:
        """Replace every `aten.linear` and `aten.embedding` by its int8 form."""
        import torch

        from mobile_export.rewrite import editable, reexport, swap

        module = editable(program.exported)
        codes = _CodeBook(module)
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


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of a weight fp32 [N, K]: codes int8 [N, K] in [-127, 127], scales fp32 [N].

    scale = max|row| / 127 (a row of zeros gets scale 1); codes = round half to even.
    """
    import torch

    scales = weight.abs().amax(dim=1) / 127
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # NaN stays: the check sees it
    codes = torch.empty_like(weight, dtype=torch.int8)
    for rows in range(0, len(weight), 8192):  # in slices: the whole in fp32 would double peak memory
        part = slice(rows, rows + 8192)
        codes[part] = (weight[part] / scales[part, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


class _CodeBook:
    """Codes and scales of each weight of a module, made once a weight: tied weights get one pair."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.known: dict[int, tuple[str, str]] = {}

    def of(self, weight: Node) -> tuple[Node, Node]:
        """Two attribute nodes (codes, scales), placed where `weight` is."""
        name = str(weight.target)
        tensor = tensor_of(self.module, weight)
        key = tensor.data_ptr()
        if key not in self.known:
            base = name.replace(".", "_").removesuffix("_weight")
            self.known[key] = (f"{base}_codes", f"{base}_scales")
            for attribute, value in zip(self.known[key], quantize_per_channel(tensor.detach()), strict=True):
                self.module.register_buffer(attribute, value)
        graph: Graph = self.module.graph
        with graph.inserting_before(weight):
            codes, scales = (graph.get_attr(attribute) for attribute in self.known[key])
        return codes, scales
