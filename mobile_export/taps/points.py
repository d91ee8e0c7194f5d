"""Where values are compared: the products of a program, what they read, the residual sums, the keys.

Each place is found by structure alone (the k-th product, the k-th sum), which every lowering keeps: so
an artefact has the same places, whatever its runtime calls them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

Role = Literal["embedding", "product", "operand", "keys", "sum"]
_WEIGHT = re.compile(r"(?:layers[._](\d+)[._])?(?:(self_attn|mlp)[._])?(\w+?)(?:[._]weight|_codes)")


class Place(NamedTuple):
    """A place in the model, by the names of its modules."""

    layer: int | None
    kind: str
    """`embed_tokens`, `lm_head`; of a layer `self_attn.` or `mlp.` and: the linear's own name (`q_proj`),
    `norm` (before them), `keys` (as they go into the cache), `attention` (what o_proj reads),
    `activation` (what down_proj reads), `residual` (the stream after them); `norm`: the last one."""


class Call(NamedTuple):
    """One call of a model: `tokens` continue the cache at `start`."""

    tokens: tuple[int, ...]
    start: int


Values = dict[Place, "Tensor"]
"""fp32 [rows, width] of one call: a row for each token, or for the last one only."""


@dataclass(frozen=True)
class Point:
    """A place of one program."""

    place: Place
    node: Node
    role: Role
    index: int
    """Which of its role in the order of the program, from 0; of an operand: the first product to read it."""

    @property
    def width(self) -> int:
        """Columns."""
        return math.prod(size for size in self.node.meta["val"].shape[1:] if isinstance(size, int))


def points(module: GraphModule) -> list[Point]:
    """Every place of a program that `rewrite.editable` opened, in its order.

    ValueError: its logits are not a linear layer's.
    """
    import torch

    aten, mobile = torch.ops.aten, torch.ops.mobile
    embeddings = (aten.embedding.default, mobile.embedding_int8.default)
    linears = (aten.linear.default, mobile.linear_int8.default, mobile.linear_int4.default)
    output: Any = module.graph.output_node()
    head = output.args[0][0]
    found: dict[Node, Point] = {}
    counts = dict.fromkeys(("embedding", "product", "keys", "sum"), 0)

    def add(node: Any, layer: int | None, kind: str, role: Role) -> None:
        index = counts["product" if role == "operand" else role]
        if node not in found:
            found[node] = Point(Place(layer, kind), node, role, index)
        if role != "operand":
            counts[role] += 1

    for node in module.graph.nodes:
        writer = next((found[part] for part in node.all_input_nodes if _is_product(found.get(part))), None)
        if node.target in embeddings:
            add(node, None, "embed_tokens", "embedding")
        elif node.target in linears:
            layer, group, own = _of_weight(node)
            add(node.args[0], layer, group + _made(node.args[0]), "operand")
            add(node, layer, "lm_head" if node is head else group + own, "product")
        elif node.target == mobile.attention.default:
            add(node.args[1].args[1], counts["keys"], "self_attn.keys", "keys")
        elif node.target == aten.add.Tensor and writer:
            group = writer.place.kind.partition(".")[0]
            add(node, writer.place.layer, f"{group}.residual", "sum")
    if not _is_product(found.get(head)):
        raise ValueError("the program's logits are not a linear layer's")
    return [found[node] for node in module.graph.nodes if node in found]


def rows(value: Tensor, node: Node) -> Tensor:
    """[S, width] of a node's value, which is [1, S, ...] or [1, heads, S, head_dim]."""
    tokens_first = value.transpose(1, 2) if _heads_first(node) else value
    return tokens_first[0].reshape(tokens_first.shape[1], -1)


def put(part: Tensor, value: Tensor, node: Node) -> Tensor:
    """A node's value with its last rows replaced: the inverse of `rows`."""
    changed = value.clone()
    tokens_first = changed.transpose(1, 2) if _heads_first(node) else changed
    tokens_first[0, -len(part) :] = part.reshape(-1, *tokens_first.shape[2:])
    return changed


def _heads_first(node: Node) -> bool:
    """Whether it is the third dimension that varies."""
    return isinstance(node.meta["val"].shape[1], int)


def _is_product(point: Point | None) -> bool:
    return point is not None and point.role == "product"


def _of_weight(node: Node) -> tuple[int | None, str, str]:
    """Layer, group and own name by what a product's weight is called."""
    name = str(node.args[1].target).replace("backbone.", "").replace("backbone_", "")  # type: ignore[union-attr]
    found = _WEIGHT.fullmatch(name)
    layer, group, own = found.groups() if found else (None, None, name)
    return int(layer) if layer else None, f"{group}." if group else "", own


def _made(node: Any) -> str:
    """What makes a value that a product reads."""
    import torch

    aten, mobile = torch.ops.aten, torch.ops.mobile
    while node.target in (aten.view.default, aten.reshape.default, aten.transpose.int):
        node = node.args[0]
    made = {mobile.rms_norm.default: "norm", mobile.attention.default: "attention"}
    return made.get(node.target, "activation")
