"""Bundles of one small model for every platform, and what parity and bench say of them."""

from pathlib import Path

import msgspec
import pytest

from mobile_export.latency import reports
from mobile_export.latency.protocol import (
    Check,
    Contender,
    DeviceInfo,
    FirstToken,
    Load,
    Machine,
    Memory,
    Protocol,
    Regime,
    Turn,
)


@pytest.fixture(scope="session")
def folders(spec, tmp_path_factory):
    """A bundle's folder by platform."""
    from mobile_export.export import export_all

    out = tmp_path_factory.mktemp("report")
    made = export_all(model=spec(), context=64, out=out)
    return {Path(one.folder).name: Path(one.folder) for one in made}


@pytest.fixture(scope="session")
def parity_file(folders, tmp_path_factory):
    """What `parity --json` writes of the Core ML bundle, its artefact alone, on the short prompts."""
    from mobile_export.bundle import load
    from mobile_export.stages import STAGES, inputs, parity

    report = parity(inputs(load(folders["ios"]), short=True), STAGES[-1:])
    path = tmp_path_factory.mktemp("parity") / "ios.json"
    path.write_bytes(msgspec.json.encode(report))
    return path


@pytest.fixture(scope="session")
def blame_file(folders, tmp_path_factory):
    """What `blame --json` writes of the Core ML bundle's artefact."""
    from mobile_export.bundle import load
    from mobile_export.stages import inputs
    from mobile_export.taps.blame import blame

    report = blame(inputs(load(folders["ios"]), short=True), ["artifact"])
    path = tmp_path_factory.mktemp("blame") / "ios.json"
    path.write_bytes(msgspec.json.encode(report))
    return path


@pytest.fixture(scope="session")
def whole(folders, parity_file, blame_file):
    """Everything of the three bundles but a bench."""
    from mobile_export.report.data import gather

    return gather(list(folders.values()), parity=[parity_file], blame=[blame_file], ranges=True)


@pytest.fixture
def bench_file(folders, tmp_path):
    """Writes a bench report whose times are known: ours twice as fast as the peer, Core ML not run.

    `not_speed`: why nothing on that device is a speed.
    """
    from mobile_export.bundle import load

    digest = load(folders["android"]).manifest.model.digest

    def write(not_speed=""):
        made = [
            contender("android", "ExecuTorch", digest),
            contender("peer.gguf", "llama.cpp", digest, peer=True),
            contender("ios", "Core ML", digest, not_speed="evaluated, not run"),
        ]
        timed = {"android": 1, "peer.gguf": 2}
        kind = "qemu-arm64" if not_speed else "host"
        path = tmp_path / "bench.json"
        reports.save(
            reports.Report(
                started="2026-11-25T10:00:00+00:00",
                device=DeviceInfo(name=kind, kind=kind, not_speed=not_speed),
                machine=Machine(cpu="Cortex-A72", cores=4, memory_bytes=4 << 30, system="Linux", versions={}),
                protocol=Protocol(threads=(2,), regimes=(Regime(prompt=32), Regime(prompt=0, decode=2))),
                contenders=tuple(made),
                checks=tuple(Check(contender=one.name, threads=2, matched=7, expected=8) for one in made),
                loads=tuple(
                    Load(contender=name, threads=2, kind="cold", ns=300_000_000 * slower, cached=0.0)
                    for name, slower in timed.items()
                ),
                memory=tuple(
                    Memory(contender=name, threads=2, floor_bytes=10**8, peak_bytes=6 * 10**8 * slower)
                    for name, slower in timed.items()
                ),
                turns=tuple(turn for name, slower in timed.items() for turn in turns(name, slower)),
                first_tokens=tuple(
                    FirstToken(
                        contender=name,
                        threads=2,
                        round=0,
                        tokens=20,
                        tokenize_ns=10**6,
                        prefill_ns=99 * 10**6 * slower,
                    )
                    for name, slower in timed.items()
                ),
            ),
            path,
        )
        return path

    return write


def contender(name, runtime, digest, peer=False, not_speed=""):
    return Contender(
        name=name,
        runtime=runtime,
        peer=peer,
        file_bytes=5 * 10**8,
        model=digest,
        options={},
        not_speed=not_speed,
    )


def turns(name, slower):
    """Prefill of 32 tokens in 100, 110 and 120 ms, decode in 10 ms a token: that many times as long."""
    for number, ns in enumerate((100, 120, 110)):
        of = {"contender": name, "threads": 2, "round": number}
        yield Turn(**of, prompt=32, prefill_ns=ns * 10**6 * slower, decode_ns=(), tokens=(5,))
        step = 10**7 * slower
        yield Turn(**of, prompt=0, prefill_ns=0, decode_ns=(step, step), tokens=(7, 5, 6))
