"""Measuring on Android through the real adb client; the server behind it, and its phones, are fake."""

import re
import shutil
import threading

import fake_bundle
import msgspec
import pytest
from fake_adb import FakeAdbServer
from fake_app import FakeApp
from fake_device import FEATURES, NEVER, PROPERTIES, FakeDevice

from mobile_export.errors import ExportError
from mobile_export.latency import contract, devices, dumpsys, protocol, reports
from mobile_export.latency.devices import Entry, Options, adb
from mobile_export.latency.protocol import Regime

ADB = shutil.which("adb")
NO_ADB = "adb is not installed: Debian's package adb, or Android's platform-tools"
PLAN = protocol.Protocol(
    rounds=3,
    threads=(1, 2),
    regimes=(Regime(prompt=8, decode=5), Regime(prompt=0, decode=4)),
    loads=2,
    long_seconds=1,
    long_regime=Regime(prompt=0, decode=6),
)
SHORT = msgspec.structs.replace(PLAN, rounds=2, threads=(1,), loads=1, long_seconds=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return fake_bundle.write(tmp_path_factory.mktemp("adb") / "bundle")


@pytest.fixture
def serve(monkeypatch):
    """Devices behind a server that every adb started from here talks to."""
    if not ADB:
        pytest.skip(NO_ADB)
    servers = []

    def start(*there):
        server = FakeAdbServer(*there)
        servers.append(server.__enter__())
        monkeypatch.setenv("ADB_SERVER_SOCKET", server.spec)
        return server

    yield start
    for server in servers:
        server.__exit__()


def measure(bundles, plan=SHORT, device="adb"):
    """Samples, and what is said of the device."""
    entries = [Entry(contender(one, f"bundle {index}"), one.folder) for index, one in enumerate(bundles)]
    with devices.open_device(devices.parse(device), Options()) as there:
        return there.measure(entries, plan), there.info


def contender(bundle, name):
    return protocol.Contender(
        name=name,
        runtime="none",
        peer=False,
        file_bytes=bundle.bytes,
        model=bundle.manifest.model.digest,
        options={},
    )


def test_a_good_run(serve, bundle):
    phone = FakeDevice()
    serve(phone)
    samples, info = measure([bundle], PLAN)
    assert info == protocol.DeviceInfo(name="adb:FAKE0001", kind="adb", not_speed="a fake device of a test")
    each = ["load", "load", "memory", "turns", "first-token"]
    assert phone.app.done == ["check", *each, *each, "long-run"]
    rounds = [(turn.threads, turn.round, turn.prompt, len(turn.decode_ns)) for turn in samples.turns]
    assert rounds == [(t, r, *size) for t in (1, 2) for r in range(3) for size in ((8, 5), (0, 4))]
    assert [(load.kind, load.threads, load.ns) for load in samples.loads] == [
        (kind, threads, ns * 1_000_000)
        for threads in (1, 2)
        for _ in range(2)
        for kind, ns in (("cold", 25), ("warm", 15))
    ]
    assert [len(run.decode_ns) for run in samples.long_runs] == [3]
    assert len(samples.first_tokens) == 6 and samples.first_tokens[0].tokens == 20
    assert samples.checks[0].matched == 64 and samples.checks[0].expected == 62
    assert samples.machine.versions == {"app": "0", "none": "0", "none: flavour": "fake"}


@pytest.mark.parametrize(
    ("features", "kinds"),
    [
        (("shell_v2",), {"STAT", "SEND", "RECV"}),
        (("shell_v2", "stat_v2"), {"STA2", "LST2", "SEND", "RECV"}),
        (FEATURES, {"STA2", "LST2", "SEND", "RECV", "SND2", "RCV2"}),
    ],
)
def test_devices_of_other_features(serve, bundle, features, kinds):
    """What is negotiated decides; a client before adb 31 sends and receives in the first version."""
    phone = FakeDevice(features=features)
    serve(phone)
    assert measure([bundle])[0].turns
    assert set(phone.transfers) <= kinds and len(set(phone.transfers)) >= 3
    assert all(phone.files[path] for path in phone.files)


def test_the_command_writes_a_report_in_which_nothing_is_a_speed(serve, bundle, cli, tmp_path):
    serve(FakeDevice())
    names = [tmp_path / name for name in ("report.json", "llama.json")]
    options = ["--device", "adb", "--rounds", "2", "--threads", "1", "--long", "1"]
    done = cli("bench", bundle.folder, *options, "--json", names[0], "--llama-bench", names[1])
    report = reports.load(names[0])
    assert report.device.name == "adb:FAKE0001" and report.device.not_speed == "a fake device of a test"
    assert len(report.turns) == 2 * len(report.protocol.regimes)
    assert len(report.long_runs) == 1
    device, checked = done.stdout.splitlines()
    assert device.startswith("adb:FAKE0001: none, 8 cores, Nobody Fake, Android 16")
    assert checked.startswith(
        "executorch on adb:FAKE0001: not a speed (a fake device of a test); source's tokens 64"
    )
    assert done.returncode == 2 and not names[1].exists()
    assert "nothing in this report is a speed: a fake device of a test" in done.stderr


def test_the_command_lists_devices(serve, cli):
    serve(FakeDevice(), FakeDevice("FAKE0002", state="unauthorized"))
    said = cli("devices").stdout
    assert re.search(r"adb:FAKE0001 +ready +Fake", said) and re.search(r"adb:FAKE0002 +not ready", said)
    assert "adb:FAKE0002: unauthorized: unlock it and confirm this computer" in said


def test_what_the_host_reads_of_the_phone(serve, bundle):
    serve(FakeDevice())
    samples, _ = measure([bundle])
    # meminfo's PSS, above the app's own peak.
    assert samples.memory[0].peak_bytes == 716800 * 1024 and samples.memory[0].floor_bytes == 50 << 20
    first, *others, last = samples.states
    assert [(state.round, state.when) for state in samples.states] == [
        (number, when) for number in (0, 1) for when in ("before", "after")
    ]
    assert first.celsius == last.celsius == {"CPU0": 41.5, "SKIN": 33.25}
    assert not any(state.celsius for state in others)
    assert first.battery == protocol.Battery(percent=80, charging=True, celsius=30.5)
    assert first.governor == "schedutil" and len(first.mhz) == 8


def test_a_second_run_pushes_nothing_but_requests_and_leaves_none(serve, bundle):
    phone = FakeDevice()
    server = serve(phone)
    measure([bundle])
    kept = dict(phone.files)
    assert sorted(path.split("/", 7)[7] for path in kept) == sorted([*bundle.manifest.files, "manifest.json"])
    pushes = [name for name in server.requests if name == "sync:"]
    measure([bundle])
    again = [name for name in server.requests if name == "sync:"]
    # A launch is one push and one pull; the bundle's files were pushed the first time alone.
    assert len(again) - len(pushes) == len(pushes) - len(kept)
    assert phone.files == kept


def test_a_file_that_differs_there_is_pushed_again(serve, bundle):
    phone = FakeDevice()
    serve(phone)
    measure([bundle])
    path = next(path for path in phone.files if path.endswith("model.pte"))
    whole = phone.files[path]
    phone.files[path] = whole[:-1]
    measure([bundle])
    assert phone.files[path] == whole


def test_devices_are_found_whatever_their_state(serve):
    states = ["unauthorized", "offline", "no permissions (missing udev rules?); see [nowhere]", "sideload"]
    wireless = "adb-FAKE (2)._adb-tls-connect._tcp"
    serve(FakeDevice(wireless), *(FakeDevice(f"FAKE000{at}", state=state) for at, state in enumerate(states)))
    ready, *others = adb.found()
    assert (ready.name, ready.what, ready.ready, ready.hint) == (f"adb:{wireless}", "Fake", True, "")
    assert [one.name for one in others] == [f"adb:FAKE000{at}" for at in range(4)]
    assert not any(one.ready for one in others)
    starts = ["unauthorized: unlock it and", "offline: plug it", "no permissions: give", "sideload: start A"]
    assert all(one.hint.startswith(start) for one, start in zip(others, starts, strict=True))


def test_one_of_two_devices_by_its_serial(serve, bundle):
    phones = FakeDevice(), FakeDevice("FAKE0002")
    serve(*phones)
    _, info = measure([bundle], device="adb:FAKE0002")
    assert info.name == "adb:FAKE0002" and phones[1].app.done and not phones[0].app.done
    with pytest.raises(
        ExportError, match="adb has 2 devices; name one: --device adb:FAKE0001 or adb:FAKE0002"
    ):
        measure([bundle])


@pytest.mark.parametrize(
    ("phone", "message"),
    [
        ({"state": "offline"}, "device FAKE0001 is offline; plug it in again, or run `adb reconnect`"),
        ({"state": "unauthorized"}, "is unauthorized; unlock it and confirm this computer in the dialog"),
        ({"state": "authorizing"}, "is authorizing; unlock it and confirm this computer in the dialog"),
        ({"state": "recovery"}, "is recovery; start Android on it and switch on USB debugging"),
        ({"app": None}, f"does not have the app {contract.APP}; see docs/device-contract.md"),
        (
            {"properties": PROPERTIES | {"ro.build.version.sdk": "25"}, "features": ()},
            "has Android's API level 25, and 30 is the least; use a phone with Android 11 or later",
        ),
    ],
)
def test_a_device_that_cannot_measure(serve, bundle, phone, message):
    serve(FakeDevice(**phone))
    with pytest.raises(ExportError, match=message):
        measure([bundle])


def test_no_device(serve, bundle):
    serve()
    with pytest.raises(ExportError, match="adb has no device; plug in a phone with USB debugging"):
        measure([bundle])
    with pytest.raises(ExportError, match="adb has no device 'X'; plug it in; there now: none"):
        measure([bundle], device="adb:X")


def test_no_adb(monkeypatch, bundle, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="adb is not installed; install Android's platform-tools"):
        measure([bundle])
    assert adb.found() == []


def test_a_server_that_is_no_adb(serve, bundle, monkeypatch):
    server = serve()
    monkeypatch.setattr(server, "listing", lambda long: 1 / 0)
    with pytest.raises(ExportError, match="adb fails: .*; run `adb kill-server`"):
        measure([bundle])


def test_a_server_that_cannot_be_reached(bundle):
    """The session's own setting: see tests/conftest.py."""
    if not ADB:
        pytest.skip(NO_ADB)
    with pytest.raises(ExportError, match="adb fails: failed to check server version: .*; run `adb k"):
        measure([bundle])
    assert adb.found() == []


def test_a_push_that_is_cut_off(serve, bundle):
    phone = FakeDevice(cut_push_after=100_000)
    serve(phone)
    with pytest.raises(
        ExportError, match=r"is offline: the copy of 'model.pte' was cut off; plug it in again.*stays"
    ):
        measure([bundle])
    assert not any(path.endswith("model.pte") for path in phone.files)
    # Plugged in again, it goes on with what is missing.
    phone.state, phone.cut_push_after = "device", NEVER
    samples, _ = measure([bundle])
    assert samples.turns


def test_a_full_phone(serve, bundle):
    serve(FakeDevice(room=1000))
    with pytest.raises(
        ExportError, match="is full: the copy of 'model.pte' was cut off; free some space on it"
    ):
        measure([bundle])


def test_a_copy_that_is_not_what_was_sent(serve, bundle):
    serve(FakeDevice(rots=True))
    with pytest.raises(ExportError, match=r"'.+' arrived with another sha256; check the cable"):
        measure([bundle])


def test_a_pull_that_is_cut_off(serve, bundle):
    phone = FakeDevice(cut_pull_after=100)
    serve(phone)
    with pytest.raises(ExportError, match="is offline: the copy of 'report.json' from it was cut off; plug"):
        measure([bundle])


def test_a_pull_that_is_short_and_says_nothing(serve, bundle):
    serve(FakeDevice(short_pull=100))
    with pytest.raises(ExportError, match=r"the report came back as 100 of \d{3} bytes; check the cable"):
        measure([bundle])


@pytest.mark.parametrize(
    ("do", "reason", "message"),
    [
        (
            "turns",
            ("5 (APP CRASH(NATIVE))", "crash"),
            r"the app ended in 'turns' after 1 of 2 rounds: APP CRASH\(NATIVE\), crash; read `adb logcat",
        ),
        ("load", ("6 (ANR)", "null"), "the app ended in 'load': ANR; read `adb logcat -b crash -d`"),
        (
            "memory",
            ("3 (LOW MEMORY)", "null"),
            "the app ended in 'memory': LOW MEMORY; close other apps, or export with a smaller --context",
        ),
    ],
)
def test_an_app_that_crashes(serve, bundle, do, reason, message):
    phone = FakeDevice(app=FakeApp(crash_in=do), exit_reason=reason)
    # An older crash is not taken for this one.
    phone._exited("4 (APP CRASH(EXCEPTION))", "older")
    serve(phone)
    with pytest.raises(ExportError, match=message):
        measure([bundle])
    assert not any("/runs/" in path or "report.json" in path for path in phone.files)


def test_a_crash_that_the_system_has_no_record_of(serve, bundle, monkeypatch):
    phone = FakeDevice(app=FakeApp(crash_in="check"))
    phone._exited("4 (APP CRASH(EXCEPTION))", "older")
    monkeypatch.setattr(phone, "_exited", lambda *reason: None)
    serve(phone)
    with pytest.raises(ExportError, match="the app ended in 'check': Process crashed.; read `adb logcat -d`"):
        measure([bundle])


def test_a_phone_that_is_unplugged_in_mid_run(serve, bundle, monkeypatch):
    phone = FakeDevice()
    monkeypatch.setattr(phone.app, "run", lambda *ways: phone.unplug() or 1 / 0)
    server = serve(phone)
    monkeypatch.setattr(server, "handle_error", lambda *of: None)
    with pytest.raises(ExportError, match="device FAKE0001 is offline: 'dumpsys' failed; plug it in again"):
        measure([bundle])


def test_a_run_that_does_not_end(serve, bundle, monkeypatch):
    phone, stopped = FakeDevice(), threading.Event()
    monkeypatch.setattr(adb, "LAUNCH_SECONDS", 0.5)
    monkeypatch.setattr(phone.app, "run", lambda *ways: stopped.wait(20) and 1 / 0)
    am = phone._am
    monkeypatch.setattr(
        phone, "_am", lambda words, out: stopped.set() or 0 if "force-stop" in words else am(words, out)
    )
    server = serve(phone)
    monkeypatch.setattr(server, "handle_error", lambda *of: None)
    with pytest.raises(ExportError, match="'check' took longer than 0 s; restart the phone"):
        measure([bundle])


def test_throttling_is_reported(serve, bundle, capsys):
    serve(FakeDevice(app=FakeApp(thermal=("none", "severe")), thermal_status=3))
    samples, _ = measure([bundle])
    assert [state.thermal for state in samples.states] == ["none", "none", "severe", "severe"]
    assert "throttled: severe" in capsys.readouterr().err


def test_a_core_ml_bundle_is_for_another_phone(serve, tmp_path):
    serve(FakeDevice())
    with pytest.raises(
        ExportError, match="no Android phone runs a Core ML bundle; measure it with --device ios"
    ):
        measure([fake_bundle.write(tmp_path / "ios", target="coreml")])


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({}, ""),
        ({"ro.boot.qemu": "1"}, "an emulator, no phone"),
        ({"ro.kernel.qemu": "1"}, "an emulator, no phone"),
        ({"ro.hardware": "ranchu"}, "an emulator, no phone"),
        ({"ro.product.name": "mobile_export_fake"}, "a fake device of a test"),
    ],
)
def test_what_is_no_phone_is_known_before_the_app_says_so(serve, properties, reason):
    serve(FakeDevice(properties={**PROPERTIES, "ro.product.name": "husky", **properties}))
    with devices.open_device(devices.parse("adb"), Options()) as there:
        assert there.info.not_speed == reason


def test_what_dumpsys_does_not_say_is_unknown():
    assert dumpsys.look("", "") == dumpsys.Look()
    assert dumpsys.look("Thermal Status: 9\n", "level: 5\nscale: 0\nstatus: 2").thermal is None
    assert dumpsys.last_exit("nothing") is None and dumpsys.total_pss_bytes("No process found") == 0


def test_old_meminfo():
    assert dumpsys.total_pss_bytes("               TOTAL:    12345      TOTAL SWAP PSS: 5") == 12345 * 1024
