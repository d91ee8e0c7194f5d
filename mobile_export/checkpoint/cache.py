"""Where fetched and converted models live."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_export.files import disk_errors, new_folder


def root() -> Path:
    """`MOBILE_EXPORT_CACHE` when it is set, else the platform's user cache."""
    import platformdirs

    chosen = os.environ.get("MOBILE_EXPORT_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mobile-export")


def checkpoints() -> Path:
    """Whole transformers folders, one a model."""
    return root() / "checkpoints"


def downloads() -> Path:
    """What came over the network, as it came."""
    return root() / "downloads"


def build(path: Path, intact: Callable[[Path], bool], write: Callable[[Path], None]) -> Path:
    """`path`, as it is when `intact`, else made by `write` (given an empty folder) and swapped in whole."""
    with lock(path.name):
        if not (path.is_dir() and intact(path)):
            with new_folder(path) as temporary:
                write(temporary)
    return path


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the cache's lock of that name, so that two processes never do the same work at once.

    The system lets go of it when the process ends, however it ends. A cache that cannot be
    written (full disk, no permission) becomes an ExportError.
    """
    with disk_errors("the model cache (MOBILE_EXPORT_CACHE)"):
        folder = root() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
