"""Storing once what a `.pte` holds twice: the runtime loads both as before."""

import pytest
import torch

from mobile_export import pte
from mobile_export.pte_share import ALIGNMENT, HEADER, SMALLEST, share_constants


class Twice(torch.nn.Module):
    """A table that a portable operator reads, and a linear in XNNPACK that may hold the same values."""

    def __init__(self, tied, rows=512, width=64):
        super().__init__()
        torch.manual_seed(0)
        table = torch.randn(rows, width)
        self.register_buffer("small", torch.randn(3, width))
        self.register_buffer("table", table)
        self.linear = torch.nn.Linear(width, rows, bias=False)
        self.linear.weight = torch.nn.Parameter(table.clone() if tied else torch.randn(rows, width))
        self.other = torch.nn.Linear(width, width)

    def forward(self, ids):
        row = torch.nn.functional.embedding(ids, self.table) + self.small[0].cumsum(0)
        return self.linear(self.other(row)), self.table.cumsum(1)


def program_of(module):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(module.eval(), (torch.tensor([[1, 500]]),))
    return to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def run(data):
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(data).load_method("forward")
    return [output.clone() for output in method.execute((torch.tensor([[1, 500]]),))]


@pytest.fixture(scope="module")
def tied():
    module = Twice(tied=True)
    data = program_of(module)
    return module, data, share_constants(data)


def test_it_is_smaller_by_the_tensor_and_says_the_same(tied, tmp_path):
    module, before, after = tied
    size = 512 * 64 * 4
    assert size >= SMALLEST
    raw = module.table.numpy().tobytes()
    assert (before.count(raw), after.count(raw)) == (2, 1)
    assert size - ALIGNMENT <= len(before) - len(after) <= size + ALIGNMENT
    expected = module(torch.tensor([[1, 500]]))
    for old, new, truth in zip(run(before), run(after), expected, strict=True):
        assert torch.equal(old, new)
        assert torch.allclose(new, truth, atol=1e-4)
    for name, data in (("before", before), ("after", after)):
        (tmp_path / name).write_bytes(data)
    old, new = pte.read(tmp_path / "before"), pte.read(tmp_path / "after")
    assert new.segments.pop("shared") == size
    assert old.methods == new.methods and old.named_data == new.named_data
    assert old.segments["named data"] - new.segments["named data"] == size


def test_every_segment_is_aligned_and_the_header_counts_them(tied):
    from mobile_export.flatbuffer import Table

    _, _, after = tied
    _, _, program_size, base, total = HEADER.unpack_from(after, 8)
    assert base + total == len(after) and program_size <= base
    offsets = [table.number(0, "Q") for table in Table.root(after).tables(4)]
    assert len(offsets) > 3 and not any((base + offset) % 16 for offset in offsets)


def test_it_is_done_once(tied):
    _, _, after = tied
    again = share_constants(after)
    assert len(again) == len(after)
    assert [torch.equal(a, b) for a, b in zip(run(again), run(after), strict=True)] == [True, True]


def test_without_duplicates_nothing_changes():
    data = program_of(Twice(tied=False))
    assert share_constants(data) == data


def test_small_duplicates_are_left_alone():
    data = program_of(Twice(tied=True, rows=501, width=16))
    assert SMALLEST > 501 * 16 * 4
    assert share_constants(data) == data
