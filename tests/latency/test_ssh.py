"""Bundles on a machine behind ssh: a real sshd on the loopback, and what goes wrong with one."""

import os
import shutil
import subprocess
import sys
import threading
import time
from importlib import metadata

import msgspec
import psutil
import pytest
from sshd import ABSENT, PRESENT, Sshd

from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.latency import bench
from mobile_export.latency.devices import Options, open_device, parse, ssh
from mobile_export.latency.devices.host import WORKER
from mobile_export.latency.devices.ssh import Board
from mobile_export.latency.protocol import Protocol, Regime, token_ids
from mobile_export.latency.remote import Remote
from mobile_export.latency.remote import parse as parse_address
from mobile_export.latency.workers import Worker
from mobile_export.targets import target

pytestmark = pytest.mark.skipif(not PRESENT, reason=ABSENT)
PLAN = Protocol(
    rounds=1,
    threads=(1,),
    regimes=(Regime(prompt=8), Regime(prompt=0, decode=4)),
    loads=1,
    long_seconds=0,
    long_regime=Regime(prompt=0, decode=4),
)
HERE = Options(python=sys.executable, busy=True)


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    """A server of this test's own, and the client that finds it."""
    server = Sshd(tmp_path, tmp_path / "cache")
    server.start()
    monkeypatch.setenv("PATH", str(server.client), prepend=os.pathsep)
    yield server
    server.stop()


def eventually(holds):
    """A cut session's processes end by themselves, a moment later."""
    for _ in range(100):
        if holds():
            return True
        time.sleep(0.1)
    return False


def test_a_bundle_is_measured_there(sshd, sandbox_bundle):
    first = bench.bench([sandbox_bundle.folder], device=sshd.name, plan=PLAN, options=HERE)
    assert (first.device.name, first.device.kind, first.device.not_speed) == (sshd.name, "ssh", "")
    assert [turn.prompt for turn in first.turns] == [8, 0] and all(turn.tokens for turn in first.turns)
    assert first.checks[0].matched > 0 and first.memory[0].peak_bytes > 1e7
    runner = target("executorch").open(sandbox_bundle.path("program"))
    assert first.turns[0].tokens == (runner.last_logits(token_ids(8, runner.vocab), 0).argmax(),)
    assert eventually(lambda: sshd.left() == [])


def test_what_is_there_is_not_copied_again(sshd, sandbox_bundle, tmp_path, capsys):
    def copied(folder):
        entry = bench._bundles("ssh", [folder], [bench.bundles.load(folder)])
        with open_device(parse(sshd.name), HERE) as board:
            board._copy(entry)
            run = next((sshd.store / "runs").iterdir())
            assert (run / "0" / "model.pte").read_bytes() == (folder / "model.pte").read_bytes()
            assert (run / "package" / "mobile_export" / "cli.py").is_file()
        return {path.name: path.stat().st_mtime_ns for path in (sshd.store / "files").iterdir()}

    before = copied(sandbox_bundle.folder)
    held = {file.sha256 for file in sandbox_bundle.manifest.files.values()}
    assert held < set(before) and len(before) == len(held) + 1
    assert copied(sandbox_bundle.folder) == before
    damaged = sshd.store / "files" / sandbox_bundle.manifest.files["model.pte"].sha256
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert copied(sandbox_bundle.folder).keys() == before.keys()


@pytest.fixture
def large(sandbox_bundle, tmp_path):
    """The bundle with a file that takes a second to copy, and no room on the disk here."""
    folder = tmp_path / "large"
    shutil.copytree(sandbox_bundle.folder, folder)
    with (folder / "NOTICE").open("wb") as file:
        file.truncate(800_000_000)
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    manifest["files"]["NOTICE"] |= {"bytes": 800_000_000, "sha256": sha256_file(folder / "NOTICE")}
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return folder


def test_the_connection_is_cut_in_mid_copy(sshd, large):
    def coming():
        return any(part.stat().st_size > 1_000_000 for part in (sshd.store / "files").glob("*.part"))

    seen = []
    cutting = threading.Thread(target=lambda: (seen.append(eventually(coming)), sshd.cut()))
    cutting.start()
    with pytest.raises(
        ExportError, match=r"the connection to '\w+@127.0.0.1' failed: .+; look after the dev"
    ):
        bench.bench([large], device=sshd.name, plan=PLAN, options=HERE)
    cutting.join()
    assert seen == [True]
    assert eventually(lambda: sshd.left() == [])
    whole = {sha256_file(path) for path in (sshd.store / "files").iterdir()}
    assert whole == {path.name for path in (sshd.store / "files").iterdir()}


COPY = """
import sys
from pathlib import Path
from mobile_export.latency import bench
from mobile_export.latency.devices import Options, open_device, parse
with open_device(parse(sys.argv[1]), Options()) as board:
    folder = Path(sys.argv[2])
    board._copy(bench._bundles("ssh", [folder], [bench.bundles.load(folder)]))
"""


def test_this_end_dies_in_mid_copy(sshd, large, command):
    """As after a kill, or with a laptop that went away."""
    arguments = command()
    arguments["args"] = [sys.executable, "-c", COPY, sshd.name, str(large)]
    with subprocess.Popen(**arguments, stderr=subprocess.DEVNULL) as process:
        assert eventually(lambda: list((sshd.store / "files").glob("*.part")))
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
    assert eventually(lambda: sshd.left() == [])


def test_what_a_power_cut_left_is_swept_up(sshd):
    files = sshd.store / "files"
    files.mkdir(parents=True)
    (files / "abc.4194304.part").touch()
    (files / f"abc.{os.getpid()}.part").touch()
    with open_device(parse(sshd.name), HERE):
        assert [path.name for path in files.iterdir()] == [f"abc.{os.getpid()}.part"]


def test_the_disk_there_is_full(sshd, sandbox_bundle):
    sshd.cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", sshd.cache], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(
            ExportError, match="' failed: .*No space left on device; mend that there, then run"
        ):
            bench.bench([sandbox_bundle.folder], device=sshd.name, plan=PLAN, options=HERE)
        assert eventually(lambda: sshd.left() == [])
    finally:
        subprocess.run(["umount", sshd.cache], check=True)


def test_a_key_that_opens_nothing(sshd, sandbox_bundle):
    sshd.identify("stranger")
    with pytest.raises(
        ExportError, match="does not accept this user's key; make `ssh .+` work without a pass"
    ):
        bench.bench([sandbox_bundle.folder], device=sshd.name, plan=PLAN, options=HERE)


def test_a_host_that_nobody_knows(sshd, sandbox_bundle):
    (sshd.folder / "known_hosts").write_text("")
    with pytest.raises(ExportError, match="is not a known host, or its key has changed; make `ssh"):
        bench.bench([sandbox_bundle.folder], device=sshd.name, plan=PLAN, options=HERE)


def test_a_host_that_is_not_there(sshd, sandbox_bundle):
    sshd.stop()
    with pytest.raises(
        ExportError, match=r"the connection to '.+' failed: .*[Cc]onnection refused; look after"
    ):
        bench.bench([sandbox_bundle.folder], device=sshd.name, plan=PLAN, options=HERE)


def test_a_host_that_goes_while_it_works(sshd, sandbox_bundle):
    entries = bench._bundles("ssh", [sandbox_bundle.folder], [sandbox_bundle])
    with open_device(parse(sshd.name), HERE) as board:
        board._copy(entries)
        with Worker(board._launch(0, entries[0], sys.executable)) as worker:
            worker.open(1)
            sshd.cut()
            with pytest.raises(ExportError, match="the connection to '.+' was lost; look after the device"):
                worker.ask("turn", prompt=[1], decode=1)
    assert eventually(lambda: sshd.left() == [])


def test_a_worker_that_is_killed_there(sshd, sandbox_bundle):
    """As by a system that ran out of memory: the connection holds, and that is not taken for a lost one."""
    entries = bench._bundles("ssh", [sandbox_bundle.folder], [sandbox_bundle])
    with open_device(parse(sshd.name), HERE) as board:
        board._copy(entries)
        with Worker(board._launch(0, entries[0], sys.executable)) as worker:
            worker.open(1)
            working = [one for one in sshd.children() if one.cmdline()[-2:] == list(WORKER)]
            max(working, key=lambda one: one.memory_info().rss).kill()
            with pytest.raises(ExportError, match=r"the worker of 'executorch' died at 'turn' \(SIGKILL\)"):
                worker.ask("turn", prompt=[1], decode=1)


def test_a_machine_without_a_python_that_is_new_enough(sshd, sandbox_bundle, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "python3").write_text("#!/bin/sh\nexit 1\n")
    (old / "python3").chmod(0o755)
    board = Board(parse(sshd.name), Options(), parse_address(parse(sshd.name).address), str(sshd.store), "")
    script = f"PATH={old}:$PATH\n{ssh._ENVIRONMENT}"
    with pytest.raises(ExportError, match="it has no python3 of version 3.11 or later; mend that there"):
        board._remote.run(script, str(sshd.store / "venvs" / "x"), "a", "b")


@pytest.mark.parametrize(
    "address",
    [
        "board",
        "@board",
        "pi@",
        "-oProxyCommand=x@board",
        "pi@-board",
        "pi@board:0",
        "pi@board:99999",
        "a@b c",
    ],
)
def test_addresses_that_name_nobody(address):
    with pytest.raises(ExportError, match="names no user, host and port; write ssh:USER@HOST"):
        parse_address(address)


def test_addresses():
    assert parse_address("pi@board:2222") == Remote("pi@board", "2222")
    assert parse_address("pi@[fe80::1%eth0]:22") == Remote("pi@fe80::1%eth0", "22")


def test_what_a_target_needs_is_installed_here_with_a_pin():
    for names in ssh.NEEDS.values():
        for name in (*names, *ssh._ALWAYS):
            assert metadata.version(name)
