"""The few prompts that every export runs through the real runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_export import golden
from mobile_export.checkpoint import cache
from mobile_export.errors import ExportError
from mobile_export.prompts import Prompts, load_prompts

if TYPE_CHECKING:
    from mobile_export.types import Checkpoint


def short_golden(checkpoint: Checkpoint, context: int) -> golden.Golden:
    """What the source says on the short prompts: the committed golden, else recorded now and cached."""
    prompts = load_prompts()
    try:
        found = golden.find(checkpoint, prompts)
    except ExportError:
        short = Prompts(tuple(prompt for prompt in prompts.items if prompt.short), prompts.sha256)
        kept = cache.root() / "goldens" / checkpoint.digest[:16]
        try:
            found = golden.find(checkpoint, short, kept)
        except ExportError:
            found = golden.record(checkpoint, short)
            golden.save(found, kept / checkpoint.name)
    return found.subset(short=True, context=context)
