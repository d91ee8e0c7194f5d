"""Groups of nodes that a delegate runs in one go, on random graphs."""

import graphlib
import random

import pytest
import torch

from mobile_export.targets.executorch_partition import by_level


def drawn(seed):
    """A random graph, and the nodes that may be delegated."""
    chance, graph = random.Random(seed), torch.fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(3)]
    nodes += [graph.get_attr(f"weight{index}") for index in range(3)]
    made = []
    for _ in range(chance.randrange(5, 60)):
        node = graph.call_function(torch.add, tuple(chance.choices(nodes, k=2)))
        made.append(node)
        nodes.append(node)
    graph.output(tuple(node for node in made if not node.users))
    return graph, {node for node in made if chance.random() < 0.7}


@pytest.mark.parametrize("seed", range(50))
def test_each_group_can_run_in_one_go(seed):
    graph, inside = drawn(seed)
    groups = by_level(graph, inside)
    assert sorted(node.name for group in groups for node in group) == sorted(node.name for node in inside)
    of = {node: f"group {index}" for index, group in enumerate(groups) for node in group}
    before: dict[str, set[str]] = {}
    for node in graph.nodes:
        me = of.get(node, node.name)
        before.setdefault(me, set()).update(of.get(one, one.name) for one in node.all_input_nodes)
        before[me].discard(me)
    graphlib.TopologicalSorter(before).prepare()  # CycleError: two of them wait for one another


def test_one_group_between_two_nodes_outside():
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    first = graph.call_function(torch.mul, (x, x))
    outside = graph.call_function(torch.relu, (first,))
    unpacked = graph.call_function(torch.neg, (weight,))
    product = graph.call_function(torch.mm, (outside, unpacked))
    graph.output(graph.call_function(torch.relu, (product,)))
    assert by_level(graph, {first, unpacked, product}) == [[first], [unpacked, product]]
