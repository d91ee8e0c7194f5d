"""A copy of a `.pte` whose `forward` also gives its intermediate values; weights are the same bytes.

Only the program's flatbuffer is written anew: constants and named data follow it as they were.
"""

from __future__ import annotations

import math
import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobile_export.pte_share import ALIGNMENT, HEADER
from mobile_export.taps.points import Role
from mobile_export.taps.xnnpack import Graph

Tap = tuple[Role, int]


def tap(artifact: Path, out: Path, rows: int) -> dict[Tap, list[int]]:
    """Write the copy; which of the outputs hold a value side by side, by role and number.

    A value added holds at most `rows` positions: more than that must not be fed in one call.
    """
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program

    with artifact.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _, _, size, base, segments = HEADER.unpack_from(data, 8)
        program = _flatbuffer_to_program(data[:size])
        program.execution_plan = [plan for plan in program.execution_plan if plan.name != "forward_all"]
        places = _Forward(program, memoryview(data)[base:], rows).run()
        head = _encode(program, segments)
        with out.open("wb") as copy:
            copy.write(head)
            file.seek(base)
            shutil.copyfileobj(file, copy, 1 << 20)
    return places


class _Forward:
    """Adds outputs to the method that devices run."""

    def __init__(self, program: Any, segments: Any, rows: int) -> None:
        self.program, self.segments, self.rows = program, segments, rows
        self.plan = next(plan for plan in program.execution_plan if plan.name == "forward")
        self.calls = [instruction.instr_args for instruction in self.plan.chains[0].instructions]
        self.found: dict[Tap, list[int]] = {}

    def run(self) -> dict[Tap, list[int]]:
        """Positions in the outputs by role and number."""
        for call in self.calls:
            if hasattr(call, "delegate_index"):
                self._delegate(call)
        ((_, embedded),) = self._kernels("quantized_decomposed::embedding_byte")
        self.found["embedding", 0] = [self._kept(embedded[-1])]
        self._keys()
        del self.segments
        outputs = self.plan.outputs
        kept = (value for values in self.found.values() for value in values)
        outputs += [value for value in dict.fromkeys(kept) if value not in outputs]
        return {tap: [outputs.index(value) for value in values] for tap, values in self.found.items()}

    def _delegate(self, call: Any) -> None:
        """Products, their operands and the sums, in the order the delegate runs them."""
        from executorch.exir.schema import BackendDelegateInlineData, DataLocation

        reference = self.plan.delegates[call.delegate_index].processed
        segment = self.program.segments[reference.index]
        graph = Graph(bytes(self.segments[segment.offset : segment.offset + segment.size]))
        products, sums = graph.products()
        for product in products:
            number = self._count("product")
            self.found["operand", number] = [self._value(call, graph, value) for value in product.operands]
            self.found["product", number] = [self._value(call, graph, value) for value in product.outputs]
        for value in sums:
            self.found["sum", self._count("sum")] = [self._value(call, graph, value)]
        reference.location = DataLocation.INLINE
        reference.index = len(self.program.backend_delegate_data)
        self.program.backend_delegate_data.append(BackendDelegateInlineData(graph.encode()))

    def _value(self, call: Any, graph: Graph, value: int) -> int:
        """The program's value that is a delegate's, kept to the end."""
        at, new = graph.argument(value)
        if not new:
            return self._kept(call.args[at])
        from executorch.exir.scalar_type import ScalarType
        from executorch.exir.schema import EValue, Tensor, TensorShapeDynamism

        sizes = [int(size) for size in graph.values[value]["dims"]]
        sizes[1] = min(sizes[1], self.rows)
        tensor = Tensor(
            scalar_type=ScalarType.FLOAT,
            storage_offset=0,
            sizes=sizes,
            dim_order=list(range(len(sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=0,
            allocation_info=self._memory(1, math.prod(sizes)),
            shape_dynamism=TensorShapeDynamism.DYNAMIC_BOUND,
        )
        self.plan.values.append(EValue(tensor))
        call.args.append(len(self.plan.values) - 1)
        return len(self.plan.values) - 1

    def _kept(self, index: int) -> int:
        """A value of the program in memory of its own, so that nothing overwrites it."""
        tensor = self.plan.values[index].val
        if tensor.allocation_info is not None and index not in self.plan.outputs:
            where = tensor.allocation_info.memory_id
            tensor.allocation_info = self._memory(where, math.prod(tensor.sizes))
        return index

    def _keys(self) -> None:
        """What goes into the cache that each attention reads as its keys; int8 codes are left out."""
        from executorch.exir.scalar_type import ScalarType

        written = {arguments[1]: arguments[0] for _, arguments in self._kernels("llama::update_cache")}
        for layer, (_, arguments) in enumerate(self._kernels("llama::custom")):
            keys = written[arguments[1]]
            if self.plan.values[keys].val.scalar_type in (ScalarType.FLOAT, ScalarType.HALF):
                self.found["keys", layer] = [self._kept(keys)]

    def _kernels(self, name: str) -> Iterator[tuple[str, list[int]]]:
        """Calls of operators whose name begins so, with their arguments."""
        names = [operator.name for operator in self.plan.operators]
        for call in self.calls:
            if hasattr(call, "op_index") and names[call.op_index].startswith(name):
                yield names[call.op_index], call.args

    def _memory(self, where: int, count: int) -> Any:
        """Planned memory for so many fp32 numbers, at the end of what is planned."""
        from executorch.exir.schema import AllocationDetails

        sizes = self.plan.non_const_buffer_sizes
        begin = -(-sizes[where] // ALIGNMENT) * ALIGNMENT
        sizes[where] = begin + 4 * count
        return AllocationDetails(where, begin & 0xFFFFFFFF, begin >> 32)

    def _count(self, role: Role) -> int:
        return sum(found == role for found, _ in self.found)


def _encode(program: Any, segments: int) -> bytes:
    """The program's flatbuffer with its header, up to where the segments begin."""
    from executorch.exir._serialize import _program
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer

    made = _program_to_flatbuffer(program)
    header = _program._ExtendedHeader.EXPECTED_LENGTH
    header = -(-header // made.max_alignment) * made.max_alignment
    size = header + len(made.data)
    base = -(-size // ALIGNMENT) * ALIGNMENT
    written = _program._ExtendedHeader(size, base, segments).to_bytes().ljust(header, b"\0")
    data = _program._insert_flatbuffer_header(made.data, "ET", written)
    return data.ljust(base, b"\0")
