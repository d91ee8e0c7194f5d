"""The committed sets: texts for perplexity, problems whose answers are executed."""

from __future__ import annotations

import hashlib
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from mobile_export.errors import ExportError
from mobile_export.prompts import golden_folder

KINDS = ("english", "chinese", "code")


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text and the licence it is under (SPDX)."""

    name: str
    kind: Literal["english", "chinese", "code"]
    license: str
    source: str = ""
    """Where it was taken from; empty: written for this project."""
    text: str


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A function to write and asserts that it must keep."""

    name: str
    ask: str
    tests: str


@dataclass(frozen=True)
class Texts:
    """A text set and the sha256 of its file."""

    items: tuple[Text, ...]
    sha256: str


@dataclass(frozen=True)
class Problems:
    """A problem set, what each request ends with, and the sha256 of its file."""

    items: tuple[Problem, ...]
    instruction: str
    sha256: str


class _TextFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: tuple[Text, ...]


class _ProblemFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instruction: str
    problem: tuple[Problem, ...]


def load_texts(path: Path | None = None) -> Texts:
    """Read a text set; None is the committed one. ExportError: unreadable, or not a text set."""
    path = path or golden_folder() / "texts.toml"
    file, digest = _read(path, _TextFile)
    _refuse_names(path, file.text)
    return Texts(file.text, digest)


def load_problems(path: Path | None = None) -> Problems:
    """Read a problem set; None is the committed one. ExportError: unreadable, or not a problem set."""
    path = path or golden_folder() / "code.toml"
    file, digest = _read(path, _ProblemFile)
    _refuse_names(path, file.problem)
    return Problems(file.problem, file.instruction, digest)


def _read(path: Path, kind: type) -> tuple[Any, str]:
    try:
        data = path.read_bytes()
        return msgspec.convert(tomllib.loads(data.decode("utf-8")), kind), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise ExportError(f"cannot read '{path.name}': {error.strerror}", "check the file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ExportError(f"'{path.name}': {error}", "correct the file") from None


def _refuse_names(path: Path, items: Sequence[Text | Problem]) -> None:
    twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if twice or not items:
        raise ExportError(f"'{path.name}': {twice or 'it is empty'}", "give each entry its own name")
