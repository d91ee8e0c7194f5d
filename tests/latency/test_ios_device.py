"""Measuring on iOS through an `xcrun` on PATH that is fake, and so are its phones."""

import fake_bundle
import msgspec
import pytest
from fake_app import FakeApp
from fake_xcrun import ROOT, FakePhone, FakeXcrun

from mobile_export.errors import ExportError
from mobile_export.latency import contract, devicectl, devices, protocol
from mobile_export.latency.devices import Entry, Options, ios
from mobile_export.latency.protocol import Regime

PLAN = protocol.Protocol(
    rounds=2,
    threads=(1,),
    regimes=(Regime(prompt=8, decode=5), Regime(prompt=0, decode=4)),
    loads=1,
    long_seconds=1,
    long_regime=Regime(prompt=0, decode=6),
)
SHORT = msgspec.structs.replace(PLAN, long_seconds=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return fake_bundle.write(tmp_path_factory.mktemp("ios") / "bundle", target="coreml")


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Phones behind the `xcrun` that everything started from here finds."""
    servers = []

    def start(*phones, version=2):
        server = FakeXcrun(tmp_path, *phones, version=version)
        servers.append(server.__enter__())
        monkeypatch.setenv("PATH", str(tmp_path))
        return server

    yield start
    for server in servers:
        server.__exit__()


def measure(bundle, plan=SHORT, device="ios"):
    """Samples, and what is said of the device."""
    contender = protocol.Contender(
        name="bundle",
        runtime="none",
        peer=False,
        file_bytes=bundle.bytes,
        model=bundle.manifest.model.digest,
        options={},
    )
    with devices.open_device(devices.parse(device), Options()) as there:
        return there.measure([Entry(contender, bundle.folder)], plan), there.info


@pytest.mark.parametrize("version", [2, 5])
def test_a_good_run(serve, bundle, version):
    phone = FakePhone()
    serve(phone, version=version)
    samples, info = measure(bundle, PLAN)
    name = f"ios:{phone.udid}"
    assert info == protocol.DeviceInfo(name=name, kind="ios", not_speed="a fake device of a test")
    assert phone.app.done == ["check", "load", "memory", "turns", "first-token", "long-run"]
    assert [(turn.round, turn.prompt) for turn in samples.turns] == [(0, 8), (0, 0), (1, 8), (1, 0)]
    assert samples.memory[0].peak_bytes == 600 << 20
    assert samples.states[0].battery.celsius == 30.5


def test_only_what_the_app_lacks_is_copied(serve, bundle):
    phone = FakePhone()
    serve(phone)
    measure(bundle)
    blobs = {file.sha256 for file in bundle.manifest.files.values()}
    copied = [path for path in phone.copied if "/blobs/" in path]
    assert blobs < {path.rpartition("/")[2] for path in copied} and len(copied) == len(blobs) + 1
    damaged = copied[0]
    phone.files[damaged] = phone.files[damaged][:-1] + b"!"
    phone.copied.clear()
    measure(bundle)
    assert [path for path in phone.copied if "/blobs/" in path] == [damaged]


def test_devices_are_found_whatever_their_state(serve):
    serve(
        FakePhone(),
        FakePhone("U2", pairing="unpaired"),
        FakePhone("U3", connection="unavailable"),
        FakePhone("U4", reality="simulated"),
        FakePhone("U5", platform="watchOS"),
        version=5,
    )
    first, second, third = ios.found()
    assert (first.what, first.ready) == ("Mobile Export Fake, iOS 27.0", True)
    assert second.name == "ios:U2" and second.hint.startswith("unpaired: unlock it and trust this Mac")
    assert third.hint == "unavailable: plug it in and unlock it"


@pytest.mark.parametrize(
    ("phone", "message"),
    [
        ({"pairing": "unpaired"}, "U1: unpaired; unlock it and trust this Mac"),
        ({"connection": "unavailable"}, "U1: unavailable; plug it in and unlock it"),
        ({"developer_mode": "disabled"}, "U1: no Developer Mode; switch on Developer Mode in its settings"),
        ({"app": None}, f"U1 does not have the app {contract.APP}; see docs/device-contract.md"),
        (
            {"locked": True},
            "cannot launch the app: The application failed to launch.*; unlock the phone",
        ),
        ({"full": True}, "cannot copy to: The file could not be copied. No space left on device; free some"),
        ({"cut_copy": True}, "cannot copy to: .* The connection was invalidated.; plug it in, unlock it"),
        ({"short_copy": 50}, "the report came back with another sha256, 50 bytes; check the cable"),
    ],
)
def test_a_device_that_cannot_measure(serve, bundle, phone, message):
    serve(FakePhone("U1", **phone))
    with pytest.raises(ExportError, match=message):
        measure(bundle)


def test_a_copy_that_was_cut_off_goes_on(serve, bundle):
    phone = FakePhone(cut_copy=True)
    serve(phone)
    with pytest.raises(ExportError, match="The connection was invalidated"):
        measure(bundle)
    phone.cut_copy = False
    samples, _ = measure(bundle)
    assert samples.turns


def test_which_device(serve, bundle):
    serve(FakePhone("U1"), FakePhone("U2"))
    with pytest.raises(ExportError, match="devicectl has 2 devices; name one: --device ios:U1 or ios:U2"):
        measure(bundle)
    with pytest.raises(ExportError, match="devicectl has no device 'U3'; plug it in; there now: U1, U2"):
        measure(bundle, device="ios:U3")
    assert measure(bundle, device="ios:u2")[1].name == "ios:U2"


def test_no_device_and_no_xcrun(serve, bundle, monkeypatch, tmp_path):
    serve()
    with pytest.raises(ExportError, match="devicectl has no device; plug in an iPhone that trusts this Mac"):
        measure(bundle)
    (tmp_path / "xcrun").unlink()
    with pytest.raises(ExportError, match="xcrun is not installed; measure iPhones from a Mac with Xcode 16"):
        measure(bundle)
    assert ios.found() == []


def test_devicectl_itself_fails(serve, bundle):
    server = serve(FakePhone())
    server.broken = "Developer Mode is off"
    with pytest.raises(ExportError, match="cannot list devices: Developer Mode is off; switch on"):
        measure(bundle)
    assert ios.found() == []


def test_an_option_that_devicectl_does_not_have(serve):
    serve(FakePhone())
    with pytest.raises(ExportError, match="cannot list devices: error: Unknown option"):
        devicectl.ask("list", "devices", "--all", seconds=5)


@pytest.mark.parametrize(
    ("do", "log", "message"),
    [
        (
            "turns",
            "MobileExportSample-2026.ips",
            "the app ended in 'turns' after 1 of 2 rounds: see MobileExportSample-2026.ips; read the phone's",
        ),
        (
            "memory",
            "JetsamEvent-2026.ips",
            "ended in 'memory': iOS took its memory .JetsamEvent.*; close",
        ),
        ("load", "OtherApp-2026.ips", "ended in 'load': App terminated due to signal 9.; read the phone's"),
    ],
)
def test_an_app_that_crashes(serve, bundle, do, log, message):
    app = FakeApp(measure="phys_footprint", crash_in=do)
    old = {"JetsamEvent-2020.ips": "2020-01-01T00:00:00Z"}
    serve(FakePhone(app=app, crash_log=log, crash_logs=old))
    with pytest.raises(ExportError, match=message):
        measure(bundle)


@pytest.mark.parametrize(
    ("hangs", "message"),
    [
        (
            "--mobile-export-prepare",
            "U1: the app does not answer '--mobile-export-prepare'; install the",
        ),
        ("--mobile-export-request", "'check' took longer than 1 s; restart the phone"),
    ],
)
def test_a_run_that_does_not_end(serve, bundle, monkeypatch, hangs, message):
    serve(FakePhone("U1", hangs=hangs))
    monkeypatch.setattr(ios, "LAUNCH_SECONDS", 1.0)
    with pytest.raises(ExportError, match=message):
        measure(bundle)


def test_what_an_earlier_run_left_is_no_answer(serve, bundle, monkeypatch):
    phone = FakePhone("U1")
    serve(phone)
    measure(bundle)
    assert f"{ROOT}/inventory.json" in phone.files
    monkeypatch.setattr(phone, "launch", lambda arguments, say: 0)
    with pytest.raises(ExportError, match="U1: the app does not answer '--mobile-export-prepare'; install"):
        measure(bundle)


def test_a_phone_that_is_unplugged_in_mid_run(serve, bundle, monkeypatch):
    phone = FakePhone("U1")
    server = serve(phone)
    monkeypatch.setattr(phone.app, "run", lambda *ways: server.phones.clear())
    with pytest.raises(ExportError, match="cannot info apps: The specified device was not found. .Name: U1"):
        measure(bundle)


@pytest.mark.parametrize(
    ("model", "reality", "reason"),
    [
        ("Mobile Export Fake", "physical", "a fake device of a test"),
        ("iPhone 18", "virtual", "a simulator, no phone"),
        ("iPhone 18", "physical", ""),
    ],
)
def test_what_is_no_phone_is_known_before_the_app_says_so(serve, model, reality, reason):
    serve(FakePhone(model=model, reality=reality))
    with devices.open_device(devices.parse("ios"), Options()) as there:
        assert there.info.not_speed == reason
