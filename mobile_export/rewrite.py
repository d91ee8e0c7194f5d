"""Opening an exported program for rewriting, and closing it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from mobile_export.types import Program


def editable(exported: ExportedProgram) -> GraphModule:
    """The program as a GraphModule whose weights are attributes, free of guards and input checks."""
    module = exported.module(check_guards=False)
    module._forward_pre_hooks.clear()  # they pin input shapes that a rewrite may change
    return module


def tidy(module: GraphModule) -> None:
    """Drop dead nodes and the weights that no node reads any more."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    parameters, buffers = module.named_parameters, module.named_buffers
    for name, _ in [*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    module.recompile()


def tensor_of(module: GraphModule, node: Node) -> Tensor:
    """The weight or buffer that an attribute node reads."""
    owner, _, attribute = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def reexport(module: GraphModule, program: Program) -> ExportedProgram:
    """Export a rewritten module with the program's own signature and dynamic length."""
    import torch

    from mobile_export.types import sample_inputs

    tidy(module)
    inputs, shapes = sample_inputs(program.dims)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def swap(node: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """A call of `target` stands where `node` stood."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def rotary_tables(program: Program) -> list[Tensor]:
    """cos and sin fp32 [context, head_dim] of every position, as the program itself computes them."""
    import torch

    module = editable(program.exported)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    rotary = next(node for node in graph.nodes if node.target == torch.ops.mobile.rotary.default)
    graph.output_node().args = (rotary.args[1:],)
    tidy(module)
    caches = [None] * (2 * program.dims.layers)
    tokens = torch.zeros(1, program.dims.context, dtype=torch.int64)
    with torch.no_grad():
        return [table[0] for table in module(tokens, torch.zeros(1, dtype=torch.int64), *caches)]
