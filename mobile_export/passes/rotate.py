"""Rotate: the same function in a basis whose activations int8 and fp16 hold better, at no cost on a phone.

A transformer with RMSNorm says the same when its residual stream is multiplied by an orthogonal
matrix Q: `norm(x Q) = norm(x) Q` once each norm's weight is folded into the linears behind it.
Sources: QuaRot (arXiv 2404.00456) and, for values, R2 of SpinQuant (arXiv 2405.16406). Neither reaches
what down_proj reads: there, columns are scaled (as SmoothQuant does, arXiv 2211.10438, but by the weights
alone), which is exact between up_proj and down_proj.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError
from mobile_export.rewrite import editable, reexport, tensor_of
from mobile_export.types import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import GraphModule, Node

    from mobile_export.recipe import Recipe
    from mobile_export.types import Dims

MIX = "final_mix_weight"
"""Before a tied head: Q^T diag(w / m - 1) Q of the last norm's weight w, which the embedding cannot carry.

m is the mean of w; the norm keeps m and `x + x mix` the rest. In one matrix, Q^T diag(w) Q, the diagonal
is far above all else, and int8 loses the rest.
"""
SEED = 2
"""Of all draws; draws differ, see docs/rotation.md."""
_HINT = "set quantize.rotate = false in the recipe"
_ROWS = 16384
_LEAST = 1e-4
"""Of the mean: a column smaller than that is scaled as if it were as large."""


class Rotate:
    """fp32 Program -> fp32 Program that says the same; a tied head stays tied."""

    name = "rotate"
    reads = ("quantize.rotate",)

    def run(self, program: Program, recipe: Recipe) -> Program:
        """Rotate residual stream and values by seeded orthogonal matrices, scale MLPs' columns, in fp64.

        ExportError: the program has another structure than pre-norm blocks of linears.
        """
        passes = (*program.passes, self.name)
        if not recipe.quantize.rotate:
            return replace(program, passes=passes)
        module = editable(program.exported)
        rotate_stream(module, SEED)
        rotate_values(module, program.dims, SEED)
        balance_mlps(module)
        return Program(reexport(module, program), program.dims, passes)

    def check(self, program: Program, recipe: Recipe) -> None:
        """Weights are finite."""
        import torch

        for name, tensor in program.exported.state_dict.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ExportError(f"rotate made unusable values in '{name}'", "check the source weights")


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix diag(signs) (H (x) R): Hadamard of size 2^k, a random R of the odd factor."""

    signs: Tensor
    """fp64 [n] of 1 and -1."""
    hadamard: Tensor
    """fp64 [2^k, 2^k], orthogonal."""
    rest: Tensor
    """fp64 [m, m], orthogonal; n = 2^k m."""

    @classmethod
    def draw(cls, size: int, *seed: int) -> Rotation:
        """One of `size` columns; the same seed gives the same."""
        import numpy as np
        import torch

        generator = np.random.default_rng(seed)
        odd = size // (size & -size)
        hadamard = np.ones((1, 1))
        while len(hadamard) * odd < size:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2)
        signs = generator.choice([-1.0, 1.0], size)
        basis, upper = np.linalg.qr(generator.standard_normal((odd, odd)))
        parts = signs, hadamard, basis * np.sign(upper.diagonal())
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))

    def columns(self, weight: Tensor) -> Tensor:
        """fp64 `weight @ Q` of a weight [N, n]."""
        rows, size, odd = len(weight), len(self.hadamard), len(self.rest)
        grid = (weight.double() * self.signs).reshape(rows, size, odd).transpose(1, 2)
        grid = (grid.reshape(-1, size) @ self.hadamard).reshape(rows, odd, size).transpose(1, 2)
        return (grid.reshape(-1, odd) @ self.rest).reshape(weight.shape)


def rotate_stream(module: GraphModule, seed: int) -> None:
    """The residual stream x becomes x Q; each norm's weight moves into the linears that read it."""
    import torch

    embedding, norms, writers = stream(module)
    table: Any = embedding.args[0]
    whole = tensor_of(module, table)
    rotation = Rotation.draw(whole.shape[1], seed)
    for norm in norms:
        weight_node: Any = norm.args[1]
        weight, level = tensor_of(module, weight_node).detach().double(), 1.0
        for reader in list(norm.users):
            matrix: Any = reader.args[1]
            if tensor_of(module, matrix).data_ptr() == whole.data_ptr():
                reader.args = (reader.args[0], table, *reader.args[2:])
                level = float(weight.mean())
                square = rotation.columns(rotation.columns(torch.diag(weight / level - 1)).T)
                _insert_residual(module, reader, MIX, square)
            else:
                _update(module, matrix, lambda part, by=weight: rotation.columns(part * by))  # type: ignore[misc]
        _put(module, weight_node, torch.full_like(weight, level).float())
    _update(module, table, rotation.columns)
    for writer in writers:
        _update_outputs(module, writer, rotation.columns)


def rotate_values(module: GraphModule, dims: Dims, seed: int) -> None:
    """Each key-value head's values v become v R; the linear that reads attention undoes it."""
    for layer, (values, reader) in enumerate(attentions(module)):
        turns = [Rotation.draw(dims.head_dim, seed, layer, head) for head in range(dims.kv_heads)]

        def by_head(part: Tensor, turns: list[Rotation] = turns) -> Tensor:
            import torch

            heads = part.reshape(len(part), -1, dims.head_dim).unbind(1)
            shared = len(heads) // dims.kv_heads
            return torch.cat([turns[i // shared].columns(head) for i, head in enumerate(heads)], 1)

        _update_outputs(module, values, by_head)
        _update(module, reader.args[1], by_head)


def balance_mlps(module: GraphModule) -> None:
    """Scale s of column j of each `down(silu(gate(x)) * up(x))` moves from down_proj's into up_proj's row.

    s = sqrt(m_j / mean m), m_j the largest |weight| of column j: a few columns far above all others no
    longer set the int8 steps of all rows. up_proj's rows have steps of their own, and lose nothing.
    """
    for up, down in mlps(module):
        matrix: Any = down.args[1]
        largest = tensor_of(module, matrix).detach().double().abs().amax(0)
        scale = (largest / largest.mean()).clamp(min=_LEAST).sqrt()
        _update(module, matrix, lambda part, by=scale: part / by)  # type: ignore[misc]
        _update_outputs(module, up, lambda part, by=scale: part * by)  # type: ignore[misc]


def stream(module: GraphModule) -> tuple[Node, list[Node], list[Node]]:
    """The embedding, the norms that read the residual stream, and the linears that write to it."""
    import torch

    aten, rms_norm = torch.ops.aten, torch.ops.mobile.rms_norm.default
    (embedding,) = module.graph.find_nodes(op="call_function", target=aten.embedding.default)
    seen, norms, writers = {embedding}, [], []
    for node in module.graph.nodes:
        inside = seen.intersection(node.all_input_nodes)
        if not inside:
            continue
        if node.target == aten.add.Tensor and len(node.args) == 2:
            writers += [part for part in node.args if part not in seen]
            seen.add(node)
        elif node.target == rms_norm:
            norms.append(node)
        else:
            raise ExportError(f"the residual stream goes into {node.target}", _HINT)
    readers = [user for norm in norms for user in norm.users]
    if any(node.target != aten.linear.default for node in (*writers, *readers)):
        raise ExportError("something other than a linear reads or writes the residual stream", _HINT)
    return embedding, norms, writers


def attentions(module: GraphModule) -> list[tuple[Node, Node]]:
    """Of each attention, the linear that makes its values and the one that reads its output."""
    import torch

    aten, mobile = torch.ops.aten, torch.ops.mobile
    linear, shapes = aten.linear.default, (aten.view.default, aten.reshape.default, aten.transpose.int)
    found = []
    for node in module.graph.find_nodes(op="call_function", target=mobile.attention.default):
        update: Any = node.args[2]
        values, reader = update.args[1], next(iter(node.users))
        while values.target in shapes:
            values = values.args[0]
        while reader.target in shapes:
            reader = next(iter(reader.users))
        if values.target != linear or reader.target != linear:
            raise ExportError("an attention's values do not come from a linear", _HINT)
        found.append((values, reader))
    return found


def mlps(module: GraphModule) -> list[tuple[Node, Node]]:
    """Of each gated MLP, up_proj and down_proj, where nothing else reads what is between them."""
    import torch

    aten = torch.ops.aten
    found = []
    for down in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        gated: Any = down.args[0]
        if gated.target != aten.mul.Tensor or len(gated.users) > 1:
            continue
        kinds = {factor.target: factor for factor in gated.args}
        if kinds.keys() == {aten.silu.default, aten.linear.default}:
            up = kinds[aten.linear.default]
            if len(up.users) == 1:
                found.append((up, down))
    return found


def _update(module: GraphModule, node: Any, change: Callable[[Tensor], Tensor]) -> None:
    """The weight of an attribute node becomes `change` of it in fp64, a slice of rows at a time."""
    import torch

    parts = tensor_of(module, node).detach().split(_ROWS)
    _put(module, node, torch.cat([change(part.double()).float() for part in parts]))


def _update_outputs(module: GraphModule, linear: Node, change: Callable[[Tensor], Tensor]) -> None:
    """A linear's outputs become `change` of them: weight and bias."""
    arguments: Any = linear.args
    _, weight, *bias = arguments
    _put(module, weight, change(tensor_of(module, weight).detach().double().T).T.float())
    for node in filter(None, bias):
        _put(module, node, change(tensor_of(module, node).detach().double()[None])[0].float())


def _put(module: GraphModule, node: Any, weight: Tensor) -> None:
    import torch

    owner, _, attribute = str(node.target).rpartition(".")
    made = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    setattr(module.get_submodule(owner), attribute, made)


def _insert_residual(module: GraphModule, reader: Node, name: str, weight: Tensor) -> None:
    """What a linear reads becomes `x + x weight^T`."""
    import torch

    aten, x = torch.ops.aten, reader.args[0]
    module.register_parameter(name, torch.nn.Parameter(weight.float(), requires_grad=False))
    with module.graph.inserting_before(reader):
        change = module.graph.call_function(aten.linear.default, (x, module.graph.get_attr(name)))
        mixed = module.graph.call_function(aten.add.Tensor, (x, change))
    reader.args = (mixed, *reader.args[1:])
