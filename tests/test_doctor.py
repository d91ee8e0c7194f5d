import shutil
from importlib import metadata

import psutil
import pytest

from mobile_export import checkpoint, doctor
from mobile_export.checkpoint import catalog, gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_name(checks):
    return {one.name: one for one in checks}


def test_this_environment_is_fit_to_export(capsys):
    checks = doctor.doctor()
    found = by_name(checks)
    assert found["python"].status == "ok" and found["python"].found.startswith("3.11.")
    assert [one for one in checks if one.status == "fail"] == []
    pins = [pin for pin in doctor._pins() if "extra ==" not in pin]
    assert found["packages"].found == "{0} of {0} as pinned".format(len(pins))
    assert f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores" in found["processor"].found
    assert found["cache"].found == "empty"
    assert all(one.hint for one in checks if one.status != "ok")
    assert not any(one.hint for one in checks if one.status == "ok")
    doctor.render(checks)
    shown = capsys.readouterr().out
    assert all(one.name in shown and one.hint in shown for one in checks)


def test_a_package_of_another_version_or_missing_is_named(monkeypatch):
    pins = ["torch==2.13.0", "click==0.1", "no-such-package>=2", 'ruff==9; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: pins)
    checks = by_name(doctor.doctor())
    assert checks["package click"].status == "fail"
    assert checks["package click"].found == f"{metadata.version('click')}, not ==0.1"
    assert checks["package click"].hint == "install click==0.1"
    assert checks["package no-such-package"].found == "missing, not >=2"
    assert checks["packages"].found == "1 of 3 as pinned"
    assert doctor.worst(list(checks.values())) == "fail"


def test_pins_are_those_of_the_project_file():
    assert "torch==2.13.0" in doctor._pins()


def test_too_little_disk_or_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_CACHE_DISK", 10**18)
    monkeypatch.setattr(doctor, "_EXPORT_MEMORY", 10**18)
    checks = by_name(doctor.doctor())
    assert checks["disk of the cache"].status == checks["memory"].status == "warn"
    assert checks["disk here"].status == "ok"
    assert "MOBILE_EXPORT_CACHE" in checks["disk of the cache"].hint


def test_the_default_model_missing_then_intact_then_damaged(cache, monkeypatch):
    title = f"model {catalog.default_name()}"
    missing = by_name(doctor.doctor())[title]
    assert (missing.status, missing.found) == ("warn", "not in the cache")
    assert missing.hint == "the first export fetches 491.4 MB: be online for it"

    small = checkpoint.resolve("sandbox:qwen2?layers=1&hidden=32&vocab=300").folder
    wheels = next(model for model in catalog.load().model if model.name == catalog.default_name())

    def convert(_, out, __):
        shutil.copytree(small, out, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "convert", convert)
    folder = gguf.converted(wheels.sha256, lambda: small, lambda _: None)
    checks = by_name(doctor.doctor())
    assert checks[title].found == "in the cache, intact"
    assert checks["cache"].found.startswith("checkpoints ")

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    damaged = by_name(doctor.doctor())[title]
    assert (damaged.status, damaged.found) == ("warn", "in the cache, damaged")


def test_worst():
    ok, warn = doctor.Check("a", "ok", ""), doctor.Check("b", "warn", "", "x")
    assert doctor.worst([ok]) == "ok" and doctor.worst([ok, warn]) == "warn"
