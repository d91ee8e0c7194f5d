"""Everything a report shows, as one JSON document.

The schema file is generated from this: `python -m mobile_export.schemas`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from mobile_export import bundle as bundles
from mobile_export.blame import BlameReport
from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.manifest import Manifest
from mobile_export.parity import ParityReport
from mobile_export.report.sizes import Part, parts
from mobile_export.report.speeds import BenchFigures, figures

Read = TypeVar("Read")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class LayerRange(_Table, frozen=True):
    """The largest |value| that an op of one layer makes; None: of the ops that are in no layer."""

    layer: int | None
    op: str
    """Its type and its name."""
    largest: float | None
    """None: not finite."""


class BundleData(_Table, frozen=True):
    """One bundle, its files verified."""

    name: str
    """Its folder's, or the last two parts of its path where that is not unique."""
    manifest: Manifest
    claim: str
    """What its own parity figures do not show, where its artefact did not run in its own runtime."""
    artifact_bytes: int
    bytes: int
    """Of all files, the tokenizer's too."""
    parts: tuple[Part, ...]
    """What the artefact's bytes are for; they add up to `artifact_bytes`."""
    fp16: tuple[LayerRange, ...] = ()
    """Core ML, on the self-test, where it was asked for."""


class BundleParity(_Table, frozen=True):
    """What `parity --json` said of one of the bundles."""

    bundle: str
    report: ParityReport


class BundleBlame(_Table, frozen=True):
    """What `blame --json` said of one of the bundles."""

    bundle: str
    report: BlameReport


class Report(_Table, frozen=True):
    """All that is known of one model's bundles."""

    model: str
    checkpoint: str
    """Digest of the source."""
    bundles: tuple[BundleData, ...]
    parity: tuple[BundleParity, ...] = ()
    blames: tuple[BundleBlame, ...] = ()
    benches: tuple[BenchFigures, ...] = ()
    format: Literal["mobile-export-report"] = "mobile-export-report"
    schema_version: Literal[1] = 1


def gather(
    folders: Sequence[Path],
    *,
    parity: Sequence[Path] = (),
    blame: Sequence[Path] = (),
    bench: Sequence[Path] = (),
    ranges: bool = False,
) -> Report:
    """The bundles in `folders`, with what `parity`, `blame` and `bench` wrote of them as JSON.

    `ranges`: run Core ML bundles in the evaluator, for fp16's range by layer. ExportError: a bundle is
    not as its manifest says, they are of several models, or a file is of none of them.
    """
    opened = [bundles.load(folder) for folder in folders]
    models = {one.manifest.model.digest: one.manifest.model.name for one in opened}
    if len(models) > 1:
        listed = ", ".join(sorted(models.values()))
        raise ExportError(f"these bundles are of several models: {listed}", "make one report a model")
    (digest,) = models
    found = [_bundle(name, one, ranges) for name, one in zip(_names(folders), opened, strict=True)]
    return Report(
        model=models[digest],
        checkpoint=digest,
        bundles=tuple(found),
        parity=tuple(_parity(path, found) for path in parity),
        blames=tuple(_blame(path, found) for path in blame),
        benches=tuple(figures(path, digest) for path in bench),
    )


def encode(report: Report) -> bytes:
    """Deterministic JSON."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=1) + b"\n"


def _names(folders: Sequence[Path]) -> list[str]:
    whole = [folder.resolve() for folder in folders]
    ends = [folder.name for folder in whole]
    return ends if len(set(ends)) == len(ends) else ["/".join(folder.parts[-2:]) for folder in whole]


def _bundle(name: str, opened: Bundle, ranges: bool) -> BundleData:
    from mobile_export.targets import target

    bundles.verify(opened)
    made = opened.manifest
    core_ml = made.target == "coreml"
    return BundleData(
        name=name,
        manifest=made,
        claim=getattr(target(made.target), "CLAIM", ""),
        artifact_bytes=sum(file.bytes for file in made.files.values() if file.role == "program"),
        bytes=opened.bytes,
        parts=parts(opened),
        fp16=_ranges(opened) if ranges and core_ml else (),
    )


def _ranges(opened: Bundle) -> tuple[LayerRange, ...]:
    from mobile_export.fp16_ranges import by_layer

    return tuple(
        LayerRange(
            layer=one.layer,
            op=f"{one.op} {one.name}",
            largest=one.largest if math.isfinite(one.largest) else None,
        )
        for one in by_layer(opened)
    )


def _parity(path: Path, found: Sequence[BundleData]) -> BundleParity:
    report = _read(path, ParityReport, "parity")
    of = (report.checkpoint, report.target, report.recipe)
    for one in found:
        if of == (one.manifest.model.digest, one.manifest.target, one.manifest.recipe.digest):
            return BundleParity(bundle=one.name, report=report)
    raise _of_none(path)


def _blame(path: Path, found: Sequence[BundleData]) -> BundleBlame:
    report = _read(path, BlameReport, "blame")
    for one in found:
        if (report.model, report.target) == (one.manifest.model.name, one.manifest.target):
            return BundleBlame(bundle=one.name, report=report)
    raise _of_none(path)


def _read(path: Path, kind: type[Read], command: str) -> Read:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ExportError(f"cannot read '{path.name}': {error.strerror}", "check the path") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(
            f"'{path.name}' is no {command} report of this version: {error}",
            f"write it with `mobile-export {command} BUNDLE --json`",
        ) from None


def _of_none(path: Path) -> ExportError:
    return ExportError(f"'{path.name}' is of none of these bundles", "name its bundle too")
