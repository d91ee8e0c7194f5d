"""The JSON Schemas of what is written as JSON, committed beside this file.

`python -m mobile_export.schemas` writes them anew after a struct has changed.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

FOLDER = Path(__file__).parent


def files() -> dict[Path, bytes]:
    """Each schema's file, and what the structs of this version say it must hold."""
    from mobile_export.latency import contract, reports
    from mobile_export.manifest import Manifest
    from mobile_export.report.data import Report

    structs: dict[str, type[msgspec.Struct]] = {
        "manifest": Manifest,
        "bench": reports.Report,
        "report": Report,
        "device-request": contract.Request,
        "device-report": contract.DeviceReport,
        "device-inventory": contract.Inventory,
    }
    return {FOLDER / f"{name}.schema.json": _schema(struct) for name, struct in structs.items()}


def _schema(struct: type) -> bytes:
    described = msgspec.json.schema(struct)
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return msgspec.json.format(msgspec.json.encode(described, order="sorted"), indent=2) + b"\n"
