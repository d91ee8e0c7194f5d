"""Figures as SVG: no script, and colours that the page's style sheet gives for light and dark.

A figure is 320 units wide, about what a phone has in CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mobile_export.console import human_bytes
from mobile_export.report.sizes import Part

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH = 320.0
_LETTER = 6.6
"""Width of an average letter of the figures' text."""
_ROW = 38.0
"""Height of a bar with its label."""
_SMALLEST = 0.5
"""Units below which a rectangle of a treemap is not drawn."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    text: str
    """The value for people."""
    kind: str = "ours"
    """A CSS class: `ours`, `peer` or `failed`."""
    low: float | None = None
    high: float | None = None
    """Ends of the whisker."""
    limit: float | None = None
    """Where a mark is drawn: the value must not pass it."""


@dataclass(frozen=True)
class Series:
    """One line: a value for each place of the x axis; None where there is none."""

    name: str
    values: list[float | None] = field(default_factory=list)


def treemap(parts: Sequence[Part]) -> Markup:
    """Areas in proportion to bytes, one colour a group."""
    height = 200.0
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    sizes = {group: sum(part.bytes for part in members) for group, members in groups.items()}
    shapes: list[str] = []
    for group, outer in _squares(sizes, (0.0, 0.0, WIDTH, height)):
        members = {part.name: part.bytes for part in groups[group]}
        for name, box in _squares(members, outer):
            shapes += _cell(group, name, members[name], box)
    return _figure(shapes, height, "Sizes")


def bars(rows: Sequence[Bar], *, floor: float | None = None) -> Markup:
    """Horizontal bars, one below the other, the label and the value above each.

    With a `floor` the scale is logarithmic from there on; a value below it has no bar.
    """
    ends = [end for row in rows for end in (row.value, row.low, row.high, row.limit) if end is not None]
    scale = _Scale([floor, *(end for end in ends if end > floor)]) if floor else _Scale(ends, log=False)
    shapes: list[str] = []
    for index, row in enumerate(rows):
        top = _ROW * index
        shapes += [
            _text(0, top + 13, row.label),
            _text(WIDTH, top + 13, row.text, anchor="end", kind="value"),
            _box("track", (0, top + 19, WIDTH, 9)),
            _box(f"bar {row.kind}", (0, top + 19, scale(row.value) * WIDTH, 9)),
        ]
        if row.low is not None and row.high is not None and row.high > row.low:
            low, high = (scale(end) * WIDTH for end in (row.low, row.high))
            shapes.append(_line("whisker", low, top + 23.5, high, top + 23.5))
        if row.limit is not None:
            at = scale(row.limit) * WIDTH
            shapes.append(_line("limit", at, top + 16, at, top + 31))
    return _figure(shapes, _ROW * len(rows), "Bars")


def lines(series: Sequence[Series], ticks: Sequence[str], *, limit: float | None = None) -> Markup:
    """Lines over places that `ticks` names, on a logarithmic axis; what is not above 0 is left out.

    `limit` is drawn as a line across. A series' colour is its place among them.
    """
    left, right, top, bottom = 40.0, WIDTH - 16, 8.0, 172.0
    known = [value for one in series for value in one.values if value is not None and value > 0]
    if limit is not None:
        known.append(limit)
    scale = _Scale(known or [1.0])
    step = (right - left) / max(len(ticks) - 1, 1)

    def place(index: int, value: float) -> tuple[float, float]:
        return left + index * step, bottom - scale(value) * (bottom - top)

    shapes: list[str] = []
    for power in scale.powers():
        height = place(0, 10.0**power)[1]
        shapes.append(_line("gridline", left, height, right, height))
        shapes.append(_text(left - 4, height + 4, "10" + str(power).translate(_SUPERSCRIPT), anchor="end"))
    every = math.ceil(len(ticks) * max(map(len, ticks), default=1) * (_LETTER + 1) / (right - left))
    for index in range(0, len(ticks), max(every, 1)):
        shapes.append(_text(left + index * step, bottom + 17, ticks[index], anchor="middle"))
    if limit is not None:
        height = place(0, limit)[1]
        shapes.append(_line("limit", left, height, right, height))
    for number, one in enumerate(series):
        drawn = [place(at, value) for at, value in enumerate(one.values) if value is not None and value > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        shapes.append(f'<polyline class="series c{number % 6}" points="{path}"/>')
        shapes += [f'<circle class="c{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in drawn]
    return _figure(shapes, bottom + 24, "Lines")


class _Scale:
    """Values to [0, 1]: over whole decades, or from 0 to the largest."""

    def __init__(self, values: Sequence[float], *, log: bool = True) -> None:
        self.log = log
        self.most = max([*values, 1e-300])
        self.first = math.floor(math.log10(min(values))) if log else 0
        self.last = max(math.ceil(math.log10(self.most)), self.first + 1)

    def __call__(self, value: float) -> float:
        if not self.log:
            return max(value, 0.0) / self.most
        if value <= 0:
            return 0.0
        return min(max((math.log10(value) - self.first) / (self.last - self.first), 0.0), 1.0)

    def powers(self) -> range:
        """Of ten, to be marked: at most about seven."""
        return range(self.first, self.last + 1, math.ceil((self.last - self.first) / 6))


Box = tuple[float, float, float, float]
"""x, y, width, height."""


def _squares(sizes: dict[str, int], box: Box) -> Iterator[tuple[str, Box]]:
    """Rectangles that fill `box` in proportion, as nearly square as it goes, largest first."""
    import squarify

    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    scaled = squarify.normalize_sizes([size for _, size in ordered], *box[2:])
    for (name, _), found in zip(ordered, squarify.squarify(scaled, *box), strict=True):
        yield name, (found["x"], found["y"], found["dx"], found["dy"])


def _cell(group: str, name: str, size: int, box: Box) -> Iterator[str]:
    x, y, width, height = box
    if min(width, height) < _SMALLEST:
        return
    yield _box(f"cell {group}", box, f"{name}: {size:,} bytes")
    word, text = name.split()[0], human_bytes(size)
    if width >= max(len(word), len(text)) * _LETTER + 6 and height >= 32:
        yield _text(x + 5, y + 15, word)
        yield _text(x + 5, y + 29, text, kind="value")


def _figure(shapes: Sequence[str], height: float, title: str) -> Markup:
    from markupsafe import Markup

    head = f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{title}">'
    return Markup(head + "".join(shapes) + "</svg>")


def _box(kind: str, box: Box, title: str = "") -> str:
    from markupsafe import escape

    x, y, width, height = box
    about = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"{about}</rect>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label") -> str:
    from markupsafe import escape

    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
