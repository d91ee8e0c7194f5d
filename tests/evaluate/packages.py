"""Saving what coremltools made."""

import contextlib
import io
import warnings
from pathlib import Path


def silently(run):
    """What coremltools prints about its progress is no test's business."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def save(model, folder):
    path = Path(folder) / "model.mlpackage"
    silently(lambda: model.save(str(path)))
    return path
