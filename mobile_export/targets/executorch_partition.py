"""Which nodes of an edge program go to XNNPACK together: one delegate from attention to attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram
    from torch.fx import Graph, Node


def partitioner() -> Any:
    """XNNPACK's partitioner, without the passes and decomposition rounds that this graph has no use for.

    The stock one lowers each dynamically quantized linear alone (267 delegates for 24 layers) and
    runs 17 graph passes over each.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.canonical_partitioners.config_partitioner import (
        ConfigerationBasedPartitioner,
    )
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
    from torch.fx.passes.infra.partitioner import Partition

    class Partitioner(XnnpackPartitioner):
        def __init__(self) -> None:
            super().__init__()
            only_linear = CompileSpec("dqlinear_partitioner", b"")
            self.delegation_spec = DelegationSpec("XnnpackBackend", [only_linear])

        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            matched = self.get_matched_nodes_from_configs(ep)
            groups = by_level(ep.graph_module.graph, {node for group in matched for node in group})
            return [Partition(id=index, nodes=group) for index, group in enumerate(groups)]

        def partition(self, exported_program: ExportedProgram) -> PartitionResult:
            return ConfigerationBasedPartitioner.partition(self, exported_program)

    return Partitioner()


def by_level(graph: Graph, inside: set[Node]) -> Sequence[list[Node]]:
    """The nodes of `inside` in groups that can each run in one go.

    A node's level is how often the longest way to it changes between `inside` and outside; no way leads
    out of a level and back into it, so that a level is a group. What is made of weights alone waits for
    its first reader. One walk each way over the graph; torch's own partitioner tries pairs of groups.
    """
    level: dict[Node, int] = {}
    rooted: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            rooted.add(node)
            continue
        before = max((level[one] for one in node.all_input_nodes if one in level), default=0)
        level[node] = before + ((before + (node in inside)) % 2)
        if rooted.issuperset(node.all_input_nodes):
            rooted.add(node)
    for node in reversed(graph.nodes):
        if node in inside and node in rooted:
            level[node] = min(level[user] - (level[user] + 1) % 2 for user in node.users)
    groups: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node in inside:
            groups.setdefault(level[node], []).append(node)
    return [groups[one] for one in sorted(groups)]
