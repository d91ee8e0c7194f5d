"""Speed of a bundle, as the end of an export tells it."""

import shutil
from pathlib import Path

import pytest

from mobile_export.errors import ExportError
from mobile_export.latency import host


def test_a_bundles_speed(sandbox_bundle):
    (speed,) = host.measure(sandbox_bundle.folder, (1,))
    assert speed.threads == 1
    assert 0 < speed.load_seconds < 60
    assert speed.prefill > 1 and speed.decode > 1
    assert 2e7 < speed.peak_bytes < 4e9


@pytest.mark.parametrize(("room", "prompt", "steps"), [(32, 32, 32), (60, 4, 60), (100, 1, 63)])
def test_the_turn_fits_the_context(sandbox_bundle, monkeypatch, room, prompt, steps):
    plans = []
    monkeypatch.setattr(host, "DECODE", room)
    monkeypatch.setattr(host, "bench", lambda folders, plan, options: plans.append(plan) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.measure(sandbox_bundle.folder)
    (regime,) = plans[0].regimes
    assert (regime.prompt, regime.decode) == (prompt, steps)


def test_a_broken_bundle_is_one_line(sandbox_bundle, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    (folder / "model.pte").write_bytes(b"not a program")
    with pytest.raises(ExportError, match="the worker of 'executorch' failed at 'open': .+; check that art"):
        host.measure(folder, (1,))
    with pytest.raises(ExportError, match="there is no folder 'none'"):
        host.measure(Path(tmp_path / "none"))
