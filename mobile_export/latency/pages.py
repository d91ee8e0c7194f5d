"""Memory as the system counts it: a process' resident pages, and a file's in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def drop(files: list[Path]) -> bool:
    """Ask the system to drop files from its page cache; False where it cannot be asked.

    A page that is not on the disk yet stays: `posix_fadvise` passes it over, so that files just written
    are written out first.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def cached_share(files: list[Path]) -> float | None:
    """Share of the files' pages in the page cache (mincore); None where it is not Linux."""
    if sys.platform != "linux":
        return None
    import numpy as np

    libc, inside, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            where, answer = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(found.ctypes.data)
            if libc.mincore(where, ctypes.c_size_t(size), answer):
                return None
            del view
        inside, pages = inside + int((found & 1).sum()), pages + len(found)
    return round(inside / pages, 4)


def resident_bytes(line: str = "VmRSS") -> int:
    """Resident memory now, or its peak since this program started (`VmHWM`).

    Linux's ru_maxrss would remember the larger process it was forked from; elsewhere it is all there is.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{line}:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back() -> None:
    """Return freed memory to the system, which glibc does only when it is told to (`malloc_trim`)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
