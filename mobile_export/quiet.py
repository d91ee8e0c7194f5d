"""Keeping libraries' chatter away from the user, without losing what they say when they fail."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def python() -> None:
    """No warnings of libraries about themselves: none of them is something our user can act on."""
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def native() -> Iterator[None]:
    """Hold back what native code writes to stderr; an error inside carries its last lines."""
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            held.seek(0)
            said = held.read().decode(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(" / ".join([str(error), *said])) from error
        finally:
            os.dup2(before, 2)
            os.close(before)
