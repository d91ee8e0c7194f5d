"""Models in: whatever the user names becomes one transformers folder on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mobile_export.errors import ExportError, nearest
from mobile_export.types import Checkpoint

Progress = Callable[[str], None]
"""Called with a line of text at each step that takes seconds."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def resolve(
    spec: str | None = None, *, revision: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint that `spec` names, fetched and converted into the cache when it is not there yet.

    `spec` is a path to a transformers folder or a `.gguf` file, a catalog name, a hub id
    (`org/name` or `org/name@revision`), or `sandbox:FAMILY?layers=2&hidden=64&vocab=512`; None is
    the catalog's default. A path that exists wins over a name. `revision` is for hub models only.

    Raises ExportError when the model is unknown, cannot be fetched, is damaged, needs pickle or
    remote code, or is of a family we cannot export.
    """
    from mobile_export.checkpoint import catalog, hub

    say = progress or _silent
    name = catalog.default_name() if spec is None else spec
    local = _local(name, say)
    if local is not None:
        if revision is not None:
            raise ExportError("a revision is for hub models only", "leave out --revision, or name a hub id")
        return local
    if name in catalog.names():
        return catalog.resolve(name, revision, say)
    if Path(name).suffix in (".gguf", ".safetensors") or name.startswith(("/", ".", "~")):
        raise ExportError(f"there is no file or folder '{name}'", "check the path")
    if _HUB_ID.fullmatch(name):
        return hub.resolve(name, revision, say)
    raise ExportError(f"unknown model '{name}'", nearest(name, catalog.names()))


def _local(name: str, say: Progress) -> Checkpoint | None:
    """What is on this machine under that name, or nothing."""
    from mobile_export.checkpoint import folder, gguf, sandbox

    if name.startswith(sandbox.PREFIX):
        return sandbox.resolve(name)
    path = Path(name)
    try:
        if not name:
            return None  # Path("") would be this folder
        if path.is_dir():
            return folder.resolve(path)
        return gguf.resolve(path, say) if path.is_file() else None
    except OSError as error:
        raise ExportError(f"cannot read '{name}': {error.strerror}", "check the path") from None


def _silent(_: str) -> None: ...
