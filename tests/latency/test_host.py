"""Speed of a bundle, in a process of its own."""

import shutil
from pathlib import Path

import pytest

from mobile_export.errors import ExportError
from mobile_export.latency import host


def test_a_bundles_speed(sandbox_bundle):
    speed = host.measure(sandbox_bundle.folder, 1)
    assert speed.threads == 1
    assert 0 < speed.load_seconds < 60
    assert speed.prefill > 1 and speed.decode > 1
    assert 2e7 < speed.peak_bytes < 4e9


@pytest.mark.parametrize(("room", "prompt", "steps"), [(32, 32, 32), (60, 4, 60), (100, 1, 63)])
def test_tokens_are_counted_as_they_were_run(sandbox_bundle, monkeypatch, room, prompt, steps):
    """Each round takes a second on this clock: tokens a second are the tokens of a round."""
    monkeypatch.setattr(host, "DECODE", room)
    monkeypatch.setattr(host, "_timed", lambda work: work() or 1.0)
    speed = host._measure_here(sandbox_bundle.folder, 1)
    assert (speed.prefill, speed.decode) == (prompt, steps)


def test_a_broken_bundle_is_one_line(sandbox_bundle, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    (folder / "model.pte").write_bytes(b"not a program")
    with pytest.raises(ExportError, match="the speed run failed: .+; run `mobile-export inspect` on the b"):
        host.measure(folder, 1)
    with pytest.raises(ExportError, match="the speed run failed: .*there is no folder 'none'"):
        host.measure(Path(tmp_path / "none"), 1)
