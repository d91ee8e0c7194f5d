"""Running a program with taps; and running it on another's values, so that each error shows by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mobile_export.rewrite import editable
from mobile_export.taps.points import Call, Place, Point, Values, points, put, rows
from mobile_export.types import Program, sample_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

_Tap = Callable[[int, Point, "Tensor", tuple[Any, ...]], "Tensor"]
"""(number of the call, point, its value, the operator's arguments) -> the value to go on with."""

COLUMN = 5.0
"""Times what is expected of it, a column errs before it is guilty by itself."""


class Arithmetic(Protocol):
    """What a form of the model may compute otherwise than the program does."""

    def floor(self, point: Point) -> float:
        """Relative error that a value may have there whatever its operator."""
        ...

    def simulate(self, point: Point, args: tuple[Any, ...]) -> Tensor | None:
        """What the form makes of an operator's arguments; None: what the program makes of them."""
        ...


@dataclass(frozen=True)
class Error:
    """How far a form is from the program at one place. Relative errors are RMS over rows, each row
    (a token) against its own RMS."""

    place: Place
    own: float
    """What it made of its own inputs, against what the program makes of them."""
    expected: float
    """`own` as its arithmetic explains it."""
    total: float
    """Against the program's run on its own values: the errors of all places up to here."""
    columns: int
    """How many columns are `COLUMN` times beyond what is expected of them."""
    column: int
    """The one that is furthest beyond."""
    excess: float
    """That one's error over what is expected of it."""
    factor: float
    """What that column's values are multiplied by, by least squares."""


class Tapped:
    """A program opened for taps."""

    def __init__(self, program: Program) -> None:
        import torch

        from mobile_export import dialect

        assert dialect.rotary is not None  # importing it registered the operators
        self.dims = program.dims
        self.module: GraphModule = editable(program.exported)
        self.module.graph.set_codegen(torch.fx.graph.CodeGen())
        self.points = points(self.module)

    def values(self, calls: Sequence[Call]) -> list[Values]:
        """What the program computes at every place, by call."""
        seen: list[Values] = [{} for _ in calls]

        def keep(number: int, point: Point, value: Tensor, args: tuple[Any, ...]) -> Tensor:
            seen[number][point.place] = rows(value, point.node).clone()
            return value

        self._run(calls, keep)
        return seen

    def errors(
        self, calls: Sequence[Call], observed: Sequence[Values], arithmetic: Arithmetic
    ) -> list[Error]:
        """Of the form whose values are `observed`, in the program's order; places it lacks are left out.

        The program runs on the form's values: whatever it computes at a place, it goes on with what
        the form has there. So an error counts where it is made, and nowhere after.
        """
        whole = self.values(calls)
        sums: dict[Place, _Sums] = {}

        def compare(number: int, point: Point, value: Tensor, args: tuple[Any, ...]) -> Tensor:
            seen = observed[number].get(point.place)
            if seen is None:
                return value
            last = slice(-len(seen), None)
            right = rows(value, point.node)[last]
            simulated = arithmetic.simulate(point, args)
            noise = right if simulated is None else rows(simulated, point.node)[last]
            kept = sums.setdefault(point.place, _Sums(right.shape[1]))
            kept.add(seen, right, noise, whole[number][point.place][last])
            return put(seen, value, point.node)

        self._run(calls, compare)
        found = [point for point in self.points if point.place in sums]
        return [sums[point.place].error(point.place, arithmetic.floor(point)) for point in found]

    def _run(self, calls: Sequence[Call], tap: _Tap) -> None:
        import torch

        caches: Any = sample_inputs(self.dims)[0][2]
        for number, call in enumerate(calls):
            runner = _interpreter(self, number, tap)
            inputs = torch.tensor([list(call.tokens)]), torch.tensor([call.start])
            with torch.no_grad():
                _, *caches = runner.run(*inputs, *caches)


def _interpreter(tapped: Tapped, number: int, tap: _Tap) -> Any:
    import torch

    at = {point.node: point for point in tapped.points}

    class Interpreter(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n not in at:
                return value
            args, _ = self.fetch_args_kwargs_from_env(n)
            return tap(number, at[n], value, tuple(args))

    return Interpreter(tapped.module)


class _Sums:
    """Squares by column, each row divided by its RMS first."""

    def __init__(self, width: int) -> None:
        import torch

        self.rows = 0
        self.total = 0.0
        self.own, self.noise, self.size, self.dot = (torch.zeros(width).double() for _ in range(4))

    def add(self, seen: Tensor, right: Tensor, noisy: Tensor, whole: Tensor) -> None:
        seen, right, noisy, whole = (part.double() for part in (seen, right, noisy, whole))
        unit = _rms(right)
        self.rows += len(seen)
        self.own += ((seen - right) / unit).square().sum(0)
        self.noise += ((noisy - right) / unit).square().sum(0)
        self.size += (right / unit).square().sum(0)
        self.dot += (seen * right / unit.square()).sum(0)
        self.total += float(((seen - whole) / _rms(whole)).square().mean(1).sum())

    def error(self, place: Place, floor: float) -> Error:
        import torch

        # What is far smaller than the rest matters to nobody, and a tie in rounding moves it far.
        allowed = self.noise.clamp(min=self.noise.mean()) + floor**2 * self.size.clamp(min=self.rows)
        excess = (self.own / allowed).nan_to_num(math.inf).sqrt()
        column = int(torch.argmax(excess))
        return Error(
            place=place,
            own=math.sqrt(float(self.own.mean()) / self.rows),
            expected=math.sqrt(float(self.noise.mean()) / self.rows + floor**2),
            total=math.sqrt(self.total / self.rows),
            columns=int((excess > COLUMN).sum()),
            column=column,
            excess=float(excess[column]),
            factor=float(self.dot[column] / self.size[column]),
        )


def _rms(value: Tensor) -> Tensor:
    """By row [S, 1], at least the smallest normal number."""
    return value.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
