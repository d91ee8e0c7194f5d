"""The bench with real workers: two bundles of the small model, and the peer where it is installed."""

import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from mobile_export.errors import ExportError
from mobile_export.latency import bench, reports, rounds, tables
from mobile_export.latency.devices import Options, host
from mobile_export.latency.pages import cached_share, drop, give_back, resident_bytes
from mobile_export.latency.protocol import Protocol, Regime
from mobile_export.latency.workers import Worker

REGIMES = (Regime(prompt=8), Regime(prompt=0, decode=5), Regime(prompt=32, decode=3))
PLAN = Protocol(
    rounds=2, threads=(2,), regimes=REGIMES, loads=1, long_seconds=0.2, long_regime=Regime(prompt=0, decode=9)
)
BUSY = Options(busy=True)


@pytest.fixture(scope="module")
def measured(sandbox_bundle, peer_python, tmp_path_factory):
    """One run of the bench, for all tests that read its report."""
    copy = tmp_path_factory.mktemp("bench") / "copy"
    shutil.copytree(sandbox_bundle.folder, copy)
    return bench.bench(
        [sandbox_bundle.folder, copy],
        plan=PLAN,
        vs="llama.cpp" if peer_python else None,
        peer_python=peer_python,
        options=BUSY,
    )


def test_turns_are_interleaved(measured):
    names = [one.name for one in measured.contenders]
    done = [(turn.round, turn.prompt, turn.contender) for turn in measured.turns]
    assert done == [(r, regime.prompt, name) for r in (0, 1) for regime in REGIMES for name in names]
    # Not only noted in this order: each contender waited while the others worked.
    for name in names:
        before, after = [turn for turn in measured.turns if turn.contender == name][:2]
        between = measured.turns[measured.turns.index(before) + 1 : measured.turns.index(after)]
        assert after.idle_ns > sum(turn.prefill_ns + sum(turn.decode_ns) for turn in between)


def test_every_sample_is_kept(measured):
    names = [one.name for one in measured.contenders]
    ours = [one.name for one in measured.contenders if not one.peer]
    for turn in measured.turns:
        steps = next(regime.decode for regime in REGIMES if regime.prompt == turn.prompt)
        assert len(turn.decode_ns) == steps and len(turn.tokens) == steps + 1
        assert (turn.prefill_ns > 0) == (turn.prompt > 0) and min(turn.decode_ns, default=1) > 0
        assert turn.cpu_ns > 0
    found = [(one.contender, one.kind) for one in measured.loads]
    assert found == [(name, kind) for name in names for kind in ("cold", "warm")]
    assert [one.contender for one in measured.memory] == names
    assert all(1e7 < one.floor_bytes < one.peak_bytes < 4e9 for one in measured.memory)
    assert [(one.contender, one.round) for one in measured.first_tokens] == [
        (name, number) for number in (0, 1) for name in ours
    ]
    assert all(one.tokens > 20 and one.tokenize_ns > 0 < one.prefill_ns for one in measured.first_tokens)
    for run in measured.long_runs:
        assert {len(turn) for turn in run.decode_ns} == {9} and sum(map(sum, run.decode_ns)) > 1e8
    assert [run.contender for run in measured.long_runs] == names
    assert [one.contender for one in measured.checks] == ours
    assert all(one.matched >= one.expected > 10 for one in measured.checks)
    assert 1e9 < measured.bandwidth[0].per_second < 1e12
    (said,) = [note for note in tables.notes(measured) if "memory is read" in note]
    for one in measured.contenders:
        depths = [f"{regime.prompt}" for regime in REGIMES if regime.decode]
        assert re.search(
            f"{re.escape(one.name)} {', '.join(rf'[0-9]+% at {depth}' for depth in depths)}(;|$)", said
        )


def test_the_machine_is_looked_at_before_and_after_each_round(measured):
    rounds_of = [(one.round, one.when) for one in measured.states if one.round >= 0]
    assert rounds_of == [(number, when) for number in (0, 1) for when in ("before", "after")]
    assert all(one.load_average >= 0 and one.busy >= 0 for one in measured.states)
    assert measured.machine.versions["executorch"] and measured.machine.cores >= 1


def file_system(path):
    mounted = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    return max(mounted, key=lambda one: len(one.mountpoint)).fstype


def test_a_cold_load_finds_no_page_of_the_artefact(measured, tmp_path):
    """On Linux the system tells."""
    if file_system(tmp_path) == "tmpfs":
        pytest.skip("a file in memory is never cold")
    cold, warm = ([one.cached for one in measured.loads if one.kind == kind] for kind in ("cold", "warm"))
    if None in cold:
        pytest.skip("this system does not tell what is in its page cache")
    assert max(cold) < 0.5 < min(warm)


def test_a_file_just_written_is_dropped_too(tmp_path):
    """Its pages are not on the disk yet, and `posix_fadvise` alone leaves such pages where they are."""
    file = tmp_path / "written"
    file.write_bytes(os.urandom(8_000_000))
    if cached_share([file]) is None or file_system(tmp_path) == "tmpfs":
        pytest.skip("this system does not tell what is in its page cache, or has it in memory")
    assert drop([file]) and cached_share([file]) < 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_does_not_count_before_the_next_opening():
    blocks = [b"x" * 100_000 for _ in range(2000)]
    held, last = resident_bytes(), blocks[-1]
    del blocks
    give_back()
    assert last and resident_bytes() < held - 150_000_000


def test_two_copies_say_the_same(measured):
    first, second = (
        [turn.tokens for turn in measured.turns if turn.contender == one.name]
        for one in measured.contenders[:2]
    )
    assert first == second


def test_a_report_survives_json(measured, tmp_path):
    reports.save(measured, tmp_path / "bench.json")
    assert reports.load(tmp_path / "bench.json") == measured
    text = (tmp_path / "bench.json").read_text().replace('"schema_version": 2', '"schema_version": 1')
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ExportError, match=r"'other.json' is no bench report of this version"):
        reports.load(tmp_path / "other.json")


def test_the_table_names_everyone(measured, capsys):
    tables.render(measured)
    shown = capsys.readouterr().out
    assert all(one.name in shown for one in measured.contenders)
    assert "2 threads" in shown and "decode 5 at 0" in shown and "p50/p90/p99 at 32" in shown


def test_the_peer_carries_the_same_model(measured, peer_python):
    if peer_python is None:
        pytest.skip("llama.cpp is not installed: ci/bench-peer.sh")
    assert [one.name for one in measured.contenders if one.peer] == ["llama.cpp", "llama.cpp fa"]
    for one in measured.quality:
        assert one.kl_mean < 0.02, one
    options = measured.contenders[-1].options
    assert options["weights"] == "Q8_0" and options["llama-cpp-python"]


def test_ratios_are_paired_by_round(measured):
    """A machine that slows down between rounds slows both: what counts is each round's own ratio."""
    ours, peer = (
        msgspec.structs.replace(measured.contenders[0], name=name, peer=name == "peer")
        for name in ("ours", "peer")
    )
    speeds = {"ours": (200, 10, 30), "peer": (100, 5, 10)}
    turns = [
        msgspec.structs.replace(
            measured.turns[0], contender=name, round=i, prompt=8, prefill_ns=8 * 10**9 // speed
        )
        for name, row in speeds.items()
        for i, speed in enumerate(row)
    ]
    report = msgspec.structs.replace(measured, contenders=(ours, peer), turns=tuple(turns))
    assert tables.ratio(report, "ours", 2, "prefill", 8) == pytest.approx(2)
    medians = [statistics.median(row) for row in speeds.values()]
    assert medians[0] / medians[1] == 3


def test_a_waiting_runtime_that_spins_is_named(measured):
    assert tables.spinning(_waiting(measured, 0.01)) == []
    assert tables.spinning(_waiting(measured, 0.5)) == [one.name for one in measured.contenders]


def test_contexts_too_short_and_models_that_differ_are_refused(sandbox_bundle, tmp_path):
    with pytest.raises(ExportError, match="a context of 64 is too short for the bench; export with --con"):
        bench.bench([sandbox_bundle.folder])
    other = tmp_path / "other"
    other.mkdir()
    text = (sandbox_bundle.folder / "manifest.json").read_text()
    digest = sandbox_bundle.manifest.model.digest
    (other / "manifest.json").write_text(text.replace(digest, digest[::-1]))
    with pytest.raises(ExportError, match="these bundles hold different models"):
        bench.bench([sandbox_bundle.folder, other], plan=PLAN)


def test_round_that_says_something_else_is_no_measurement():
    said = {}
    rounds.refuse_change(said, "ours", 8, 0, (5, 6))
    rounds.refuse_change(said, "ours", 8, 1, [5, 6])
    with pytest.raises(ExportError, match="'ours' said something else in round 3 than in the first"):
        rounds.refuse_change(said, "ours", 8, 2, (5, 7))


def test_an_artefact_that_says_something_else_is_not_timed(sandbox_bundle, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    told = msgspec.json.decode((folder / "selftest.json").read_bytes())
    for case in told["cases"]:
        case["greedy"] = [token + 1 for token in case["greedy"]]
    (folder / "selftest.json").write_bytes(msgspec.json.encode(told))
    says = r"does not say there what its bundle's selftest says: 0 of the source's tokens, at export \d+"
    with pytest.raises(ExportError, match=says):
        bench.bench([folder], plan=PLAN, options=BUSY)


def test_no_peer_is_one_line(sandbox_bundle):
    nowhere = {"vs": "llama.cpp", "peer_python": Path("nowhere/python"), "options": BUSY}
    with pytest.raises(ExportError, match="llama.cpp is not installed; run ci/bench-peer.sh"):
        bench.bench([sandbox_bundle.folder], plan=PLAN, **nowhere)


def test_a_busy_machine_is_refused(sandbox_bundle):
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with pytest.raises(ExportError, match=r"other work keeps \d\.\d cores .* busy; wait until"):
            bench.bench([sandbox_bundle.folder], plan=PLAN)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_a_runtime_stays_on_its_cores(sandbox_bundle):
    entry = bench._bundles("host", [sandbox_bundle.folder], [sandbox_bundle])[0]
    launch = host.launch(entry)
    core = min(os.sched_getaffinity(0))
    with Worker(dataclasses.replace(launch, spec={**launch.spec, "cpus": [core]})) as worker:
        worker.open(2)
        threads = psutil.Process(worker._process.pid).threads()
        assert len(threads) > 1
        assert all(os.sched_getaffinity(thread.id) == {core} for thread in threads)
    with (
        Worker(dataclasses.replace(launch, spec={**launch.spec, "cpus": [4095]})) as worker,
        pytest.raises(ExportError, match="failed at 'open': OSError.*Invalid argument"),
    ):
        worker.open(1)


@pytest.mark.parametrize("text", ["1,", "two", "-1"])
def test_cores(text):
    assert bench.parse_cpus("4,0,4") == (4, 0) and bench.parse_cpus("") == ()
    with pytest.raises(ExportError, match="is no list of cores; write e.g. --cpus 4,5"):
        bench.parse_cpus(text)


@pytest.mark.parametrize("text", ["", "0", "1,", "two", "-1"])
def test_thread_counts(text):
    assert bench.parse_threads("1,2,1") == (1, 2)
    with pytest.raises(ExportError, match="is no list of thread counts; write e.g. --threads 1,2"):
        bench.parse_threads(text)


def _waiting(report, share):
    turns = [
        msgspec.structs.replace(turn, idle_ns=10**9, idle_cpu_ns=int(share * 10**9)) for turn in report.turns
    ]
    return msgspec.structs.replace(report, turns=tuple(turns))
