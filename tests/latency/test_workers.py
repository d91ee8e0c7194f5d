"""Workers that fail: one line that says which, where and why."""

import os
import shutil
import signal
import sys

import pytest

from mobile_export.errors import ExportError
from mobile_export.latency import workers
from mobile_export.latency.workers import Launch, RemoteRunner, Worker
from mobile_export.targets import target

COMMAND = (sys.executable, "-m", "mobile_export.latency.worker")


def of(folder):
    return Launch("ours", COMMAND, {"kind": "bundle", "path": str(folder)})


def test_a_worker_that_is_killed(sandbox_bundle):
    with Worker(of(sandbox_bundle.folder)) as worker:
        worker.open(1)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(ExportError, match=r"the worker of 'ours' died at 'turn' \(SIGKILL\)"):
            worker.ask("turn", prompt=[1], decode=1)


def test_a_worker_that_never_starts():
    script = "import sys; sys.exit('no such runtime')"
    with (
        Worker(Launch("peer", (sys.executable, "-c", script), {})) as worker,
        pytest.raises(ExportError, match=r"died at 'open' \(exit code 1\): no such runtime; check"),
    ):
        worker.open(1)


def test_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1.0)
    script = "import time; time.sleep(60)"
    with (
        Worker(Launch("peer", (sys.executable, "-c", script), {})) as worker,
        pytest.raises(ExportError, match=r"died at 'open' \(no answer in 1 s\)"),
    ):
        worker.open(1)


def test_a_broken_artefact(sandbox_bundle, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    (folder / "model.pte").write_bytes(b"not a program")
    with Worker(of(folder)) as worker, pytest.raises(ExportError, match="'ours' failed at 'open': .+; check"):
        worker.open(1)


def test_logits_cross_the_pipe_unchanged(sandbox_bundle):
    here = target("executorch").open(sandbox_bundle.path("program"))
    with Worker(of(sandbox_bundle.folder)) as worker:
        there = RemoteRunner(worker, worker.open(1))
        assert (there.vocab, there.context) == (here.vocab, here.context)
        assert (there.logits([5, 6, 7], 0) == here.logits([5, 6, 7], 0)).all()
