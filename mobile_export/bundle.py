"""A bundle: one folder with all an application needs, whole under its name or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from mobile_export import manifest as manifests
from mobile_export.errors import ExportError
from mobile_export.files import disk_errors, inside, new_folder, sha256_file
from mobile_export.manifest import File, Manifest, Role

MANIFEST = "manifest.json"
_COPY = "export it again, or copy it again as a whole"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk; its files are checked by `verify` only."""

    folder: Path
    manifest: Manifest

    def path(self, role: Role) -> Path:
        """The file of that role, or the package it is in. ExportError when the bundle has none."""
        for name, file in sorted(self.manifest.files.items()):
            if file.role == role:
                package = [parent for parent in PurePosixPath(name).parents if parent.suffix == ".mlpackage"]
                return inside(self.folder, str(package[0]) if package else name)
        raise ExportError(f"this bundle has no {role}", _COPY)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.manifest.files.values())


@dataclass
class Draft:
    """A bundle that is being written, under a temporary name."""

    folder: Path
    roles: dict[str, Role] = field(default_factory=dict)
    finished: bool = False

    def path(self, name: str, role: Role) -> Path:
        """Where to write the file `name` (`/` between parts)."""
        _refuse_name(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.roles[name] = role
        return path

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest with every file's sha256 and size. Again, to add quality measured on it."""
        files = {}
        for name, role in self.roles.items():
            path = self.folder / name
            files[name] = File(sha256=sha256_file(path), bytes=path.stat().st_size, role=role)
        manifest = msgspec.structs.replace(manifest, files=files)
        (self.folder / MANIFEST).write_bytes(manifests.encode(manifest))
        self.finished = True
        return Bundle(self.folder, manifest)


@contextmanager
def create(out: Path) -> Iterator[Draft]:
    """Yield a draft; when the block ends without an error it is verified and becomes the bundle at `out`.

    A bundle already at `out` is replaced only then. Any error, Ctrl-C or kill leaves it as it was.
    Raises ExportError when `out` holds something other than a bundle, or the disk refuses.
    """
    refuse_other(out)
    with disk_errors("the bundle"), new_folder(out) as folder:
        draft = Draft(folder)
        yield draft
        assert draft.finished, "call finish() before the block ends"
        verify(load(folder))


def load(folder: Path) -> Bundle:
    """The bundle in a folder, by its manifest alone; `verify` checks the files.

    Raises ExportError when there is no manifest, or it is not one that this version reads.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise ExportError(f"there is no folder '{folder.name}'", "name a bundle's folder")
    if not path.is_file():
        raise ExportError(f"'{folder.name}' is not a bundle: it has no {MANIFEST}", "name a bundle's folder")
    try:
        data = path.read_bytes()
        head = msgspec.json.decode(data, type=_Head)
        if head.format != manifests.FORMAT:
            raise ExportError(f"'{folder.name}' is not a bundle of mobile-export", "name a bundle's folder")
        if head.schema_version != manifests.SCHEMA_VERSION:
            raise ExportError(
                f"the bundle's schema version is {head.schema_version}, "
                f"and this version of mobile-export reads {manifests.SCHEMA_VERSION}",
                "use the version that wrote it, or export it again",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{MANIFEST} is damaged: {error}", _COPY) from None
    return Bundle(folder, manifest)


def verify(bundle: Bundle) -> None:
    """Check every file's size and sha256, and that nothing is missing, unlisted or outside the folder.

    Raises ExportError that names the first file which is not as the manifest says.
    """
    listed = bundle.manifest.files
    for name in sorted(listed):
        _refuse_name(name)
    found = set(_walk(bundle.folder)) - {MANIFEST}
    for name in sorted(found - listed.keys()):
        raise ExportError(f"the bundle has a file its manifest does not list: '{name}'", "remove it")
    for name, file in sorted(listed.items()):
        path = bundle.folder / name
        if name not in found:
            raise ExportError(f"the bundle lacks '{name}'", _COPY)
        if path.is_symlink() or not inside(bundle.folder, name).is_file():
            raise ExportError(f"'{name}' is a link or no plain file", _COPY)
        if path.stat().st_size != file.bytes:
            raise ExportError(f"'{name}' has {path.stat().st_size} bytes, not {file.bytes}", _COPY)
        if sha256_file(path) != file.sha256:
            raise ExportError(f"'{name}' was altered: its sha256 differs", _COPY)


class _Head(msgspec.Struct):
    """What every version of the manifest has."""

    format: str = ""
    schema_version: int = 0


def _walk(folder: Path) -> Iterator[str]:
    """Every file, and every link whatever it points to, by its path in the folder."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in [*names, *links]:
            yield (Path(root) / name).relative_to(folder).as_posix()


def _refuse_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name == MANIFEST
        or ".." in parts
        or name != "/".join(parts)
        or "\\" in name
        or ":" in name
    ):
        raise ExportError(f"'{name}' cannot be a file of a bundle", "do not use this bundle: it was altered")


def refuse_other(out: Path) -> None:
    """Never delete a folder of the user's because it was named as --out."""
    empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if empty:
        return
    try:
        load(out)
    except ExportError as error:
        if "schema version" not in error.message:
            hint = "choose another --out, or move it away"
            raise ExportError(f"'{out.name}' exists and is not a bundle", hint) from None
