"""Logits at every position from the very program a device runs, for parity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

CHUNK = 128
"""Positions `forward_all` answers in one call. Some runtimes set aside the planned memory of every method
of a program, and the logits of a whole context would be more than all weights."""


def every_position(forward: ExportedProgram) -> ExportedProgram:
    """The lowered `forward` without the two nodes that keep the last position.

    Logits are [1, S, vocab], S at most CHUNK.

    Its delegates are those of `forward`, bit for bit: what parity proves of one holds for the other.
    """
    import torch
    import torch.utils._pytree as pytree
    from executorch.exir.passes.spec_prop_pass import make_spec
    from torch.export import ExportedProgram

    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(forward.graph, {}))
    graph.output_node().meta = dict(forward.graph.output_node().meta)
    (select,) = (node for node in graph.nodes if _name(node) == "aten.select_copy.int")
    (keep,) = select.users
    hidden = select.args[0]
    length = torch.sym_min(hidden.meta["val"].shape[1], CHUNK)
    keep.replace_all_uses_with(hidden)
    graph.erase_node(keep)
    graph.erase_node(select)
    for node in reversed(graph.nodes):
        if node is hidden:
            break
        if "val" in node.meta and node.op == "call_function":
            node.meta["val"] = _lengthen(node.meta["val"], length)
            node.meta["spec"] = pytree.tree_map(make_spec, node.meta["val"])
    return ExportedProgram(
        root=forward.graph_module,
        graph=graph,
        graph_signature=forward.graph_signature,
        state_dict=forward.state_dict,
        range_constraints=forward.range_constraints,
        module_call_graph=forward.module_call_graph,
        example_inputs=forward.example_inputs,
        constants=forward.constants,
        verifiers=[forward.verifier],
    )


def _lengthen(value: Any, length: Any) -> Any:
    """A fake tensor [1, 1, N] (or a tuple of them) as [1, length, N]."""
    if isinstance(value, (tuple, list)):
        return type(value)(_lengthen(part, length) for part in value)
    return value.new_empty(1, length, value.shape[-1])


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
