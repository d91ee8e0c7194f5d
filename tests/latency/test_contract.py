"""The contract with the apps: its schemas, and reports that do not keep to it."""

import json
from pathlib import Path
from typing import get_args

import jsonschema
import msgspec
import pytest

from mobile_export import schemas
from mobile_export.errors import ExportError
from mobile_export.latency import contract
from mobile_export.latency.contract import DeviceReport, Request, Turn
from mobile_export.latency.devices import adb, ios

REQUEST = Request(
    run="0123456789abcdef",
    do="turns",
    bundle="bundles/1",
    manifest="0" * 64,
    threads=2,
    regimes=(contract.Regime(prompt=(7, 38), decode=2),),
)
REPORT = DeviceReport(
    run=REQUEST.run,
    do="turns",
    manifest=REQUEST.manifest,
    threads=2,
    status="done",
    app=contract.App(version="1", runtime="ExecuTorch", runtime_version="1.4.1"),
    phone=contract.Phone(
        kind="fake", model="Fake", soc="none", system="Android 16", cores=8, memory_bytes=8 << 30
    ),
    turns=(Turn(round=0, regime=0, prefill_ns=5, decode_ns=(1, 2), tokens=(3, 4, 5)),),
    states=(contract.State(round=0, when="before", thermal="none"),),
)
INVENTORY = contract.Inventory(run=REQUEST.run, blobs={"0" * 64: 5})


def validator(name):
    path = schemas.FOLDER / f"{name}.schema.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "message", "changes"),
    [
        ("device-request", REQUEST, ({"threads": 0}, {"do": "sing"}, {"run": "x"})),
        ("device-report", REPORT, ({"threads": 0}, {"status": "fine"}, {"manifest": "x"})),
        ("device-inventory", INVENTORY, ({"blobs": {"x": 1}}, {"blobs": {"0" * 64: -1}})),
    ],
)
def test_what_is_written_fits_its_schema(name, message, changes):
    parsed = json.loads(contract.encode(message))
    validator(name).validate(parsed)
    for change in ({"schema_version": 2}, {"extra": 1}, *changes):
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate({**parsed, **change})


def test_a_report_survives_json():
    assert contract.decode(contract.encode(REPORT)) == REPORT
    assert contract.decode_inventory(contract.encode(INVENTORY)) == INVENTORY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "the app speaks version 2 of the contract, not 1; install the app that b"),
        ({"format": "other"}, "does not keep to the contract: .* `\\$.format`; see docs/device-contract.md"),
        ({"status": "fine"}, "does not keep to the contract: .* `\\$.status`"),
        ({"turns": [{"round": 0}]}, "does not keep to the contract: .*regime.* `\\$.turns\\[0\\]`"),
        ({"speed": 1.0}, "does not keep to the contract: .*speed"),
    ],
)
def test_what_does_not_keep_to_the_contract_is_one_line(change, message):
    data = msgspec.json.encode({**msgspec.to_builtins(REPORT), **change})
    with pytest.raises(ExportError, match=message):
        contract.decode(data)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", contract.encode(REPORT)[:-9]])
def test_half_a_report_is_none(data):
    with pytest.raises(ExportError, match="the app's report does not keep to the contract"):
        contract.decode(data)


def test_the_document_names_what_the_code_does():
    path = Path(__file__).parents[2] / "docs" / "device-contract.md"
    text = path.read_text("utf-8")
    words = [*get_args(contract.Do), *get_args(contract.ErrorCode), *get_args(contract.Kind)]
    assert [word for word in words if f"`{word}`" not in text] == []
    paths = [contract.INSTRUMENTATION, f"{adb.ROOT}/bundles", f"{adb.ROOT}/runs", adb.REPORTS]
    paths += [contract.APP, f"{ios.ROOT}/runs", f"{ios.ROOT}/bundles", ios.EXECUTABLE]
    assert [name for name in paths if name not in text] == []
    assert f"`schema_version` is {contract.SCHEMA_VERSION} " in text
    assert f"Android 11 (API {adb.LEAST_API})" in text
