"""`optimum-cli export mobile`, found as optimum finds it: in the namespace package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLI = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"


def optimum_cli(*arguments):
    paths = [str(ROOT), str(ROOT / "mobile_export" / "_namespace"), *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    command = [sys.executable, "-c", CLI, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_export_lists_it():
    assert "Export a small language model to phones" in optimum_cli("export", "--help").stdout


def test_options():
    said = optimum_cli("export", "mobile", "--help").stdout
    assert all(f"--{name}" in said for name in ("platform", "model", "recipe", "context", "out", "revision"))


def test_a_mistake_is_one_line():
    pytest.importorskip("mobile_export.export")
    done = optimum_cli("export", "mobile", "--platform", "android", "--model", "qwen3-0.6")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: unknown model 'qwen3-0.6'; did you mean 'qwen3-0.6b'?"
    assert "Traceback" not in done.stderr


def test_no_init_file_hides_optimums_own_package():
    assert not list((ROOT / "mobile_export" / "_namespace").rglob("__init__.py"))
