"""Where a `slice_update` may write into its source: a KV cache is not copied for each token.

The program's meaning is that of copies. Memory is shared only where nobody can tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mobile_export.evaluate.constants import Constant

if TYPE_CHECKING:
    from mobile_export.evaluate.program import Step

Name = str | tuple[str, str]
"""Of a value; of a state, as `("state", name)`; or `CONSTANT`."""
CONSTANT = ("constant", "")


class _Groups:
    """Values, states and constants that may share memory at some time of a run."""

    def __init__(self) -> None:
        self.members: dict[Name, set[Name]] = {}

    def of(self, name: Name) -> set[Name]:
        return self.members.setdefault(name, {name})

    def join(self, one: Name, other: Name) -> None:
        merged = self.of(one) | self.of(other)
        for name in merged:
            self.members[name] = merged

    def shared_with(self, name: Name) -> set[Name]:
        """States, and constants, in its group."""
        return {one for one in self.of(name) if isinstance(one, tuple)}


def plan(steps: list[Step], outputs: Iterable[str]) -> None:
    """Mark where a `slice_update` writes in place, and where a state must copy what is written to it.

    In place: no older value that may share the source's memory is needed after it, and a state that
    may hold that memory is written before it is read again. It relies on copies at a run's borders:
    of inputs, of outputs, and of what is written to a state but is not that state's alone.
    """
    from mobile_export.evaluate.ops_shape import slice_update_in_place

    groups = _grouped(steps)
    born: dict[Name, int] = {one.name: at for at, step in enumerate(steps) for one in step.outputs}
    last: dict[Name, int] = {name: at for at, step in enumerate(steps) for name in step.op.names()}
    last.update(dict.fromkeys(outputs, len(steps)))
    for at, step in enumerate(steps):
        if step.data is not None:
            alone = isinstance(step.data, str) and groups.shared_with(step.data) == {("state", step.state)}
            step.copied = not alone
        if step.call is None or step.op.type != "slice_update":
            continue
        (source,) = step.op.arguments["x"]
        if isinstance(source, Constant):
            continue
        used = [name for name in step.op.names() if name in groups.of(source)]
        needed = any(last.get(name, -1) > at for name in groups.of(source) if born.get(name, -1) < at)
        holders = groups.shared_with(source)
        if used == [source] and not needed and all(_written_next(steps[at + 1 :], one) for one in holders):
            step.call = step.call._replace(run=slice_update_in_place)


def _grouped(steps: list[Step]) -> _Groups:
    from mobile_export.evaluate.ops import VIEWS

    groups = _Groups()
    for step in steps:
        made = [one.name for one in step.outputs]
        if step.state:
            for name in [*made, *([step.data] if isinstance(step.data, str) else [])]:
                groups.join(("state", step.state), name)
        elif step.call and step.op.type in VIEWS:
            for value in (*step.op.arguments.get("x", ()), *step.op.arguments.get("values", ())):
                for name in made:
                    groups.join(name, value if isinstance(value, str) else CONSTANT)
    return groups


def _written_next(steps: list[Step], holder: Name) -> bool:
    """Whether a state is next written rather than read. A constant is never written."""
    for step in steps:
        if ("state", step.state) == holder:
            return step.data is not None
    return False
