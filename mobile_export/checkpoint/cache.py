"""Where fetched and converted models live."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the cache's lock of that name: two processes never do the same work at once.

    The system lets go of it when the process ends, however it ends.
    """
    root().mkdir(parents=True, exist_ok=True)
    with (root() / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
