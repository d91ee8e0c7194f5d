"""Runs passes in order, checks each, and keeps what each made, by content.

A program's key covers the checkpoint, the recipe values the passes read, their source code and all
of ours it imports, the data files they name, and the versions of torch and transformers. What goes
on to the next pass is always what was stored, so a cached export and a fresh one give the same bytes.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

import mobile_export
from mobile_export import console, programs
from mobile_export.checkpoint import cache
from mobile_export.checkpoint.folder import weight_files
from mobile_export.errors import ExportError
from mobile_export.files import disk_errors, new_folder

if TYPE_CHECKING:
    from torch import Tensor

    from mobile_export.recipe import Recipe
    from mobile_export.types import Checkpoint, Program

KEPT = 8
"""Programs kept in the cache, the most recently used ones: an int8 one is as large as the model."""


class Pass(Protocol):
    """One step from a checkpoint (the first) or a program (all others) to a program."""

    name: str
    # And `reads: tuple[str, ...]`, dotted recipe keys that shape the result, e.g. ("context",). A pass
    # without it is taken to read the whole recipe: safe, but run again more often than needed.
    # And `data: tuple[str, ...]`, the package's own files that shape the result.

    def run(self, before: Any, recipe: Recipe) -> Program: ...

    def check(self, program: Program, recipe: Recipe) -> None:
        """Raise ExportError when the program is not what this pass promises."""


@dataclass(frozen=True)
class Ran:
    """What one pass cost."""

    name: str
    cached: bool
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Passed:
    """The last pass's program, and what became of each pass."""

    program: Program
    log: tuple[Ran, ...]


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    passes: Sequence[Pass],
    *,
    last: str | None = None,
    use_cache: bool = True,
) -> Passed:
    """Run `passes` up to the one named `last` (all of them by default), or take them from the cache.

    With `use_cache=False` each pass runs, and what the cache held is replaced. Raises ExportError
    that names the pass which failed and those that ran before it.
    """
    wanted = list(passes)
    if last is not None:
        wanted = wanted[: [one.name for one in passes].index(last) + 1]
    keys = keys_of(checkpoint, recipe, wanted)
    shared = _source_weights(checkpoint)
    with cache.lock("programs"):
        program, log = _cached(wanted, keys, shared) if use_cache else (None, [])
        for one, key in list(zip(wanted, keys, strict=True))[len(log) :]:
            with console.step(one.name) as cost, _blame(one.name, log):
                before = checkpoint if program is None else replace(program, source=checkpoint)
                made = one.run(before, recipe)
                del before
                one.check(made, recipe)
                program = _store(made, key, shared)
                del made
                gc.collect()  # the fp32 model is full of cycles: free it before the next pass
            log.append(Ran(one.name, False, cost.seconds, cost.peak_bytes))
        _evict()
    assert program is not None, "no passes"
    return Passed(replace(program, source=checkpoint), tuple(log))


def keys_of(checkpoint: Checkpoint, recipe: Recipe, passes: Sequence[Pass]) -> list[str]:
    """The cache key of each pass's program; each covers all before it."""
    key = _sha([checkpoint.digest, version("torch"), version("transformers")])
    keys = []
    for one in passes:
        reads = getattr(one, "reads", msgspec.structs.asdict(recipe))
        values = {path: reduce(getattr, path.split("."), recipe) for path in reads}
        key = _sha([key, one.name, msgspec.to_builtins(values), code_version(type(one)), _data_version(one)])
        keys.append(key)
    return keys


def code_version(kind: type) -> str:
    """sha256 over the source of a class's module and of every module of this package it imports."""
    found: dict[Path, bytes] = {}
    waiting = [Path(inspect.getfile(kind))]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = path.read_bytes()
            waiting += _imports(found[path])
    return _sha(sorted(hashlib.sha256(source).hexdigest() for source in found.values()))


def _data_version(one: Pass) -> list[str]:
    package = Path(mobile_export.__file__).parent
    return [hashlib.sha256((package / name).read_bytes()).hexdigest() for name in getattr(one, "data", ())]


def _imports(source: bytes) -> Iterator[Path]:
    """Files of this package that a source imports, inside functions too."""
    package = Path(mobile_export.__file__).parent
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("mobile_export."):
                path = package.joinpath(*name.split(".")[1:])
                yield from (
                    file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()
                )


def _source_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors, mapped: programs refer to them rather than store them again."""
    from mobile_export.tensors import map_tensors

    tensors: dict[str, Tensor] = {}
    for file in weight_files(checkpoint.folder):
        tensors |= map_tensors(file)
    return tensors


def _cached(
    passes: Sequence[Pass], keys: Sequence[str], shared: dict[str, Tensor]
) -> tuple[Program | None, list[Ran]]:
    """The furthest program the cache holds whole, and the log up to it."""
    for count in range(len(passes), 0, -1):
        folder = _folder(keys[count - 1])
        if not folder.is_dir():
            continue
        with console.step(passes[count - 1].name) as cost:
            try:
                program = programs.load(folder, shared)
            except ExportError:
                cost.note = "cached, but damaged"
                continue
            cost.note = "cached"
        folder.touch()
        earlier = [Ran(one.name, True, 0.0, 0) for one in passes[: count - 1]]
        return program, [*earlier, Ran(passes[count - 1].name, True, cost.seconds, cost.peak_bytes)]
    return None, []


def _store(program: Program, key: str, shared: dict[str, Tensor]) -> Program:
    with disk_errors("the cache (MOBILE_EXPORT_CACHE)"), new_folder(_folder(key)) as folder:
        programs.save(program, folder, shared)
    return programs.load(_folder(key), shared)


@contextmanager
def _blame(name: str, log: Sequence[Ran]) -> Iterator[None]:
    """An error inside names the pass and those that ran before it."""
    before = ", ".join(ran.name for ran in log) or "none"
    try:
        yield
    except ExportError as error:
        raise ExportError(
            f"pass '{name}' failed (passed before: {before}): {error.message}", error.hint
        ) from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        hint = "report this with the model's name and the output of 'mobile-export doctor'"
        raise ExportError(f"pass '{name}' failed (passed before: {before}): {reason}", hint) from error


def _folder(key: str) -> Path:
    return cache.root() / "programs" / key[:32]


def _evict() -> None:
    kept = [path for path in (cache.root() / "programs").iterdir() if not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _sha(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
