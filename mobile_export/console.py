"""Progress for people: a live line on a terminal, plain lines elsewhere.

Progress goes to stderr, results to stdout; after `json_only()` nothing here writes to stdout.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_SAMPLE_SECONDS = 0.05
_json_only = False


@dataclass
class Step:
    """What a step cost; filled in when it ends."""

    title: str
    seconds: float = 0.0
    peak_bytes: int = 0
    """Largest resident memory of this process during the step."""
    note: str = ""
    """Printed after the figures; a step may set it while it runs."""


def json_only(on: bool = True) -> None:
    """Keep stdout for one JSON document: `say` and `table` go to stderr from now on."""
    global _json_only
    _json_only = on


def say(line: str) -> None:
    """Print one line of result."""
    _results().print(line, markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of results; piped, plain aligned lines that are never wrapped or cut.

    An empty title, or columns without names, take no line.
    """
    console = _results()
    cells = [[str(cell) for cell in row] for row in rows]
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        named = any(columns)
        drawn = Table(title=Text(title) if title else None, title_justify="left", show_header=named, box=None)
        for column in columns:
            drawn.add_column(Text(column), overflow="fold")
        for row in cells:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        return
    if title:
        say(title)
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Time what happens inside and sample its peak memory; one line when it ends.

    Steps and bars nest. A step that raises says so and lets the error pass.
    """
    current = Step(title)
    before, start, done = _highest_rss(), time.perf_counter(), threading.Event()
    sampler = threading.Thread(target=_sample, args=(current, done), daemon=True)
    sampler.start()
    try:
        with _task(title, None):
            yield current
    except BaseException:
        _note(f"{title}  failed after {time.perf_counter() - start:.1f} s")
        raise
    finally:
        done.set()
        sampler.join()
        current.seconds = time.perf_counter() - start
        # The sampler can be starved by native code; the kernel's own mark cannot, but never falls.
        if (highest := _highest_rss()) > before:
            current.peak_bytes = highest
    cost = f"{title}  {current.seconds:.1f} s  peak {human_bytes(current.peak_bytes)}"
    _note(f"{cost}  {current.note}".rstrip())


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)` for `total` bytes; piped, a line at each quarter."""
    done = quarters = 0
    with _task(title, total) as update:

        def advance(count: int) -> None:
            nonlocal done, quarters
            done += count
            update(done)
            if not _progress().console.is_terminal and total and done * 4 // total > quarters:
                quarters = done * 4 // total
                _note(f"{title}  {done * 100 // total} %  {human_bytes(done)} of {human_bytes(total)}")

        yield advance


def human_bytes(count: int) -> str:
    """`491.4 MB`: decimal units, as shops and disks count."""
    if count < 1000:
        return f"{count} B"
    value, units = float(count), iter(("kB", "MB", "GB", "TB"))
    unit = ""
    while value >= 1000 and (longer := next(units, None)):
        value, unit = value / 1000, longer
    return f"{value:.1f} {unit}"


def _results() -> "Console":
    from rich.console import Console

    return Console(stderr=_json_only)


def _note(line: str) -> None:
    _progress().console.print(line, markup=False, highlight=False, soft_wrap=True)


@cache
def _progress() -> "Progress":
    """The one live display of the process: two at once would overwrite each other."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    class Cost(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text(f"{task.elapsed or 0:.0f} s")
            share = f"{task.percentage:.0f} %  {human_bytes(int(task.completed))}"
            return Text(f"{share} of {human_bytes(int(task.total))}")

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), Cost())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextmanager
def _task(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    live = _progress()
    if not live.console.is_terminal:
        yield lambda done: None
        return
    task = live.add_task(title, total=total)
    live.start()
    try:
        yield lambda done: live.update(task, completed=done)
    finally:
        live.remove_task(task)
        if not live.tasks:
            live.stop()


def _sample(current: Step, done: threading.Event) -> None:
    import psutil  # type: ignore[import-untyped]

    process = psutil.Process()
    while True:
        current.peak_bytes = max(current.peak_bytes, process.memory_info().rss)
        if done.wait(_SAMPLE_SECONDS):
            return


def _highest_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
