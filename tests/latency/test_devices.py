"""How devices are named, found and listed."""

import json

import pytest

from mobile_export.errors import ExportError
from mobile_export.latency import bench, devices
from mobile_export.latency.devices import Spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("host", Spec("host")),
        ("ssh:pi@board", Spec("ssh", "pi@board")),
        ("ssh:pi@board:22", Spec("ssh", "pi@board:22")),
        ("adb", Spec("adb")),
        ("adb:10.0.0.2:5555", Spec("adb", "10.0.0.2:5555")),
        ("ios:00008110-0", Spec("ios", "00008110-0")),
        ("qemu-arm64", Spec("qemu-arm64")),
        ("qemu-arm64:cortex-a72", Spec("qemu-arm64", "cortex-a72")),
    ],
)
def test_a_device_reads_back_as_it_was_named(text, spec):
    assert devices.parse(text) == spec and str(spec) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hots", "unknown device 'hots'; did you mean 'host'?"),
        ("", "unknown device ''; known: adb, host, ios, qemu-arm64, ssh"),
        ("ssh", "'ssh' does not name a device; write ssh:USER@HOST"),
        ("ssh:", "'ssh:' does not name a device; write ssh:USER@HOST"),
        ("adb:", "'adb:' does not name a device; write adb"),
        ("host:1", "'host:1' does not name a device; write host"),
        ("qemu-arm64:", "'qemu-arm64:' does not name a device; write qemu-arm64"),
    ],
)
def test_what_names_no_device(text, reason):
    with pytest.raises(ExportError) as error:
        devices.parse(text)
    assert str(error.value).startswith(reason)


def test_a_kind_without_a_module_is_said_so(monkeypatch):
    monkeypatch.setitem(devices.FORMS, "morse", ("morse", "no"))
    with pytest.raises(ExportError, match="this version measures on no morse device; use one of host"):
        devices.open_device(devices.parse("morse"), devices.Options())


def test_this_machine_is_listed(cli):
    done = cli("devices", "--json")
    assert done.returncode == 0, done.stderr
    host = json.loads(done.stdout)[0]
    assert (host["name"], host["ready"]) == ("host", True) and "cores" in host["what"]
    assert "ssh:USER@HOST[:PORT]" in cli("devices").stdout


def test_a_peer_runs_here_alone(sandbox_bundle):
    with pytest.raises(ExportError, match="llama.cpp runs on the host alone; leave out --vs, or --device"):
        bench.bench([sandbox_bundle.folder], device="ssh:pi@board", vs="llama.cpp")
