"""An MLP in parts, each with a range of its own where a runtime rounds activations.

What `down_proj` reads has a few columns far above all others, other ones at each token, and no fixed
basis spreads them. XNNPACK gives a token one scale a product; a product of P parts that are summed
has P, and a far column spoils only its own part. The arithmetic is the same, as are codes and scales.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

from mobile_export.rewrite import tensor_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node


def split_mlps(module: GraphModule, parts: int) -> None:
    """Cut each `down(silu(gate(x)) * up(x))` into `parts` of equal width, where they divide it."""
    import torch

    aten, linear = torch.ops.aten, torch.ops.mobile.linear_int8.default
    for down in module.graph.find_nodes(op="call_function", target=linear):
        gated = down.args[0]
        if gated.target != aten.mul.Tensor:
            continue
        factors: Any = gated.args
        if {factor.target for factor in factors} != {aten.silu.default, linear}:
            continue
        silu, up = sorted(factors, key=lambda factor: factor.target == linear)
        gate = silu.args[0]
        width = tensor_of(module, down.args[1]).shape[1]
        whole = all(len(node.users) == 1 for node in (gated, silu, gate, up))
        if gate.target == linear and whole and width % parts == 0 and parts > 1:
            _split(module, gate, up, down, width // parts)


def _split(module: GraphModule, gate: Node, up: Node, down: Node, width: int) -> None:
    import torch

    aten, linear = torch.ops.aten, torch.ops.mobile.linear_int8.default
    graph = module.graph
    arguments: Any = down.args
    _, codes, scales, bias = arguments
    products: list[Node] = []
    with graph.inserting_before(down):
        for index, first in enumerate(range(0, tensor_of(module, codes).shape[1], width)):
            cut = slice(first, first + width)
            one, other = (
                graph.call_function(linear, (part.args[0], *_rows(module, part, cut, index)))
                for part in (gate, up)
            )
            gated = graph.call_function(
                aten.mul.Tensor, (graph.call_function(aten.silu.default, (one,)), other)
            )
            columns = _part(module, codes, index, tensor_of(module, codes)[:, cut])
            products.append(graph.call_function(linear, (gated, columns, scales, None if index else bias)))
        total = reduce(lambda sum, product: graph.call_function(aten.add.Tensor, (sum, product)), products)
    down.replace_all_uses_with(total)
    for node in (down, arguments[0], *gate.users, gate, up):
        graph.erase_node(node)


def _rows(module: GraphModule, linear: Node, cut: slice, index: int) -> list[Any]:
    """Codes, scales and bias of some outputs of a linear."""
    arguments: Any = linear.args
    return [node and _part(module, node, index, tensor_of(module, node)[cut]) for node in arguments[1:]]


def _part(module: GraphModule, node: Node, index: int, part: Tensor) -> Node:
    """A buffer with memory of its own: ExecuTorch writes a view as what its storage begins with."""
    import torch

    name = f"{str(node.target).replace('.', '_')}_{index}"
    module.register_buffer(name, part.detach().clone(memory_format=torch.contiguous_format))
    return module.graph.get_attr(name)
