"""Measuring through an app, whatever it is reached by: here it runs in this process."""

import json
from contextlib import suppress

import fake_bundle
import msgspec
import pytest
from fake_app import Crash, FakeApp

from mobile_export.errors import ExportError
from mobile_export.latency import contract, phone, protocol
from mobile_export.latency.devices import Entry
from mobile_export.latency.phone_reports import Look
from mobile_export.latency.protocol import Regime

PLAN = protocol.Protocol(
    rounds=2,
    threads=(1,),
    regimes=(Regime(prompt=8, decode=5), Regime(prompt=0, decode=4)),
    loads=1,
    long_seconds=1,
    long_regime=Regime(prompt=0, decode=6),
)


class Here:
    """A link without a wire. `change` alters the last report of `do`."""

    def __init__(self, app, do="", change=None):
        self.app, self.do, self.change = app, do, change
        self.looks = []
        self.requests = []

    def push(self, bundle):
        self.folder = bundle.folder
        return "there"

    def look(self):
        self.looks.append(Look(thermal="light", celsius={"SKIN": 30.0 + len(self.looks)}))
        return self.looks[-1]

    def launch(self, request):
        self.requests.append(request)
        written = []
        with suppress(Crash):
            self.app.run(contract.encode(request), self.read, written.append)
        report = json.loads(written[-1])
        if self.change and request.do == self.do:
            self.change(report)
        return phone.Answer(contract.decode(json.dumps(report).encode()))

    def read(self, path):
        return (self.folder / path.removeprefix("there/")).read_bytes()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return fake_bundle.write(tmp_path_factory.mktemp("phone") / "bundle")


def measure(bundle, link, not_speed=""):
    """Samples, and what is said of the device."""
    contender = protocol.Contender(
        name="ours", runtime="none", peer=False, file_bytes=1, model="0" * 64, options={}
    )
    there = phone.Phone(link, protocol.DeviceInfo(name="adb:1", kind="adb", not_speed=not_speed))
    return there.measure([Entry(contender, bundle.folder)], PLAN), there.info


def test_what_is_asked_of_the_app(bundle):
    link = Here(FakeApp())
    measure(bundle, link)
    asked = {request.do: request for request in link.requests}
    assert list(asked) == ["check", "load", "memory", "turns", "first-token", "long-run"]
    assert len({request.run for request in link.requests}) == len(link.requests)
    turns = asked["turns"]
    assert (turns.rounds, turns.warmups, turns.settle_ms) == (2, 1, 200)
    assert [(len(one.prompt), one.decode, one.first) for one in turns.regimes] == [(8, 5, 7), (0, 4, 7)]
    assert turns.regimes[0].prompt == tuple(protocol.token_ids(8, 512))
    assert [one.decode for one in asked["memory"].regimes] == [4, 4]
    assert asked["first-token"].text == PLAN.text and asked["first-token"].text_tokens == 2047
    assert asked["long-run"].seconds == 1 and asked["long-run"].regimes[0].decode == 6


def test_states_have_the_apps_word_and_the_hosts_sensors(bundle):
    link = Here(FakeApp(thermal=("none", "severe")))
    samples, _ = measure(bundle, link)
    states = [(state.round, state.when, state.thermal, state.celsius) for state in samples.states]
    assert states == [
        (0, "before", "none", {"SKIN": 30.0}),
        (0, "after", "none", {}),
        (1, "before", "severe", {}),
        (1, "after", "severe", {"SKIN": 31.0}),
        (-1, "before", "none", {"SKIN": 32.0}),
        (-1, "after", "none", {"SKIN": 33.0}),
    ]


def test_what_the_app_does_not_know_of_heat_the_host_does(bundle):
    def forget(report):
        for state in report["states"]:
            del state["thermal"], state["battery_percent"]

    samples, _ = measure(bundle, Here(FakeApp(), "turns", forget))
    assert [state.thermal for state in samples.states[:4]] == ["light", "unknown", "unknown", "light"]
    assert samples.states[0].battery is None


def test_throttling_is_said_aloud(bundle, capsys):
    measure(bundle, Here(FakeApp(thermal=("none", "severe"))))
    assert "throttled: severe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "kind", "reason"),
    [
        ("", "physical", ""),
        ("", "emulator", "an emulator, no phone"),
        ("", "simulator", "a simulator, no phone"),
        ("", "fake", "a fake device of a test"),
        ("an emulator, no phone", "physical", "an emulator, no phone"),
    ],
)
def test_only_what_everybody_calls_a_phone_has_speeds(bundle, host, kind, reason):
    assert measure(bundle, Here(FakeApp(kind=kind)), host)[1].not_speed == reason


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (
            {"failure": ("device-locked", "it is\nlocked")},
            r"'ours': the app could not do 'check': it is locked \(device-locked\); unlock the phone",
        ),
        ({"failure": ("load-failed", "x")}, r"x \(load-failed\); check the bundle with `mobile-export lint`"),
        ({"failure": ("out-of-memory", "x")}, r"'memory': x \(out-of-memory\); close other apps, or export"),
        ({"changes_its_mind": True}, "'ours' said something else in round 2 than in the first"),
        (
            {"wrong": True},
            "does not say there what its bundle's selftest says: 0 of the source's tokens, at export 62",
        ),
    ],
)
def test_an_app_that_does_not_measure(bundle, app, message):
    with pytest.raises(ExportError, match=message):
        measure(bundle, Here(FakeApp(**app)))


def test_a_selftest_is_counted_to_its_first_other_word(bundle):
    def change(report):
        report["checks"][0]["tokens"][25] += 1

    samples, _ = measure(bundle, Here(FakeApp(), "check", change))
    assert samples.checks == (protocol.Check(contender="ours", threads=1, matched=57, expected=62),)


@pytest.mark.parametrize(
    ("do", "change", "message"),
    [
        ("check", lambda r: r.update(schema_version=2), "the app speaks version 2 of the contract, not 1"),
        ("check", lambda r: r.update(status="running"), "ended as 'running'; see docs/device-contract.md"),
        ("check", lambda r: r.update(run="f" * 16), "is of another request; see docs/device-contract.md"),
        ("load", lambda r: r.update(manifest="f" * 64), "is of another request"),
        ("check", lambda r: r.update(checks=[]), "the report of 'check' lacks its samples"),
        ("load", lambda r: r.update(loads=[]), "the report of 'load' lacks its samples"),
        ("memory", lambda r: r.update(memory=None), "the report of 'memory' lacks its samples"),
        ("turns", lambda r: r["turns"].pop(), "the report of 'turns' lacks turns"),
        ("turns", lambda r: r["states"].pop(0), "the report of 'turns' lacks states"),
        ("turns", lambda r: r["turns"][0]["decode_ns"].pop(), "the report of 'turns' lacks decoded tokens"),
        ("turns", lambda r: r["turns"][0]["tokens"].pop(), "the report of 'turns' lacks a prompt's answer"),
        ("turns", lambda r: r["turns"][0].update(prefill_ns=0), "'turns' lacks a prompt's answer"),
        ("first-token", lambda r: r["first_tokens"].pop(), "the report of 'first-token' lacks rounds"),
        (
            "long-run",
            lambda r: r["turns"][0].update(regime=1),
            "the report of 'long-run' lacks decoded tokens",
        ),
    ],
)
def test_a_report_that_is_not_what_was_asked_for(bundle, do, change, message):
    with pytest.raises(ExportError, match=message):
        measure(bundle, Here(FakeApp(), do, change))


def test_a_report_cut_off_in_mid_run_says_how_far_it_came(bundle):
    def change(report):
        report["turns"] = report["turns"][:2]
        report["status"] = "failed"
        report["error"] = {"code": "left-foreground", "message": "somebody called"}

    with pytest.raises(ExportError, match=r"could not do 'turns' after 1 of 2 rounds: somebody called "):
        measure(bundle, Here(FakeApp(), "turns", change))


def test_several_bundles_share_one_report(bundle, tmp_path):
    other = fake_bundle.write(tmp_path / "other", seed=1)

    class Both(Here):
        def launch(self, request):
            digests = {one.folder: phone.sha256_file(one.folder / "manifest.json") for one in (bundle, other)}
            self.folder = next(folder for folder, sha in digests.items() if sha == request.manifest)
            return super().launch(request)

    contenders = [
        protocol.Contender(name=name, runtime="none", peer=False, file_bytes=1, model="0", options={})
        for name in ("one", "two")
    ]
    entries = [Entry(*pair) for pair in zip(contenders, (bundle.folder, other.folder), strict=True)]
    there = phone.Phone(Both(FakeApp()), protocol.DeviceInfo(name="adb:1", kind="adb"))
    samples = there.measure(entries, PLAN)
    turns = [(turn.round, turn.contender) for turn in samples.turns if turn.prompt]
    assert turns == [(number, name) for number in (0, 1) for name in ("one", "two")]
    states = [(state.round, state.when) for state in samples.states if state.round >= 0]
    assert states == [(n, when) for n in (0, 0, 1, 1) for when in ("before", "after")]
    assert msgspec.json.encode(samples)
