"""Execute a model's code in a confined process, and say how it ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobile_export.errors import ExportError

_SCRIPT = Path(__file__).with_name("_confined.py")
# As -I, but with an environment of one variable, so that the order of a set of strings is the same
# each time; no site packages, no byte code written.
_PYTHON = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
_MOST = 4096
"""Bytes read of what the process says."""


@dataclass(frozen=True)
class Limits:
    """What the code may use."""

    seconds: float = 10.0
    """By the clock."""
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20
    """Of address space, the interpreter's included."""


def execute(code: str, tests: str, limits: Limits | None = None) -> str:
    """`passed` when `code` and then `tests` ran to their end in one namespace; else why not, in one line.

    Python's standard library only, in an empty folder that is removed. Raises ExportError where
    the machine cannot confine it; then nothing was executed.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    asked = {
        "code": code,
        "tests": tests,
        "nonce": nonce,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
    }
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *_PYTHON, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        said, status = _wait(process, json.dumps(asked).encode(), limits.seconds)
    mark, _, verdict = said.decode(errors="replace").partition(" ")
    if mark != nonce or not verdict.endswith("\n"):
        return _ending(status)
    if verdict == "unconfined\n":
        raise ExportError(
            "this machine cannot confine a model's code",
            "it takes seccomp of Linux on x86-64 or aarch64; leave the code prompts out with --code 0",
        )
    return verdict.strip()


def _wait(process: subprocess.Popen[bytes], asked: bytes, seconds: float) -> tuple[bytes, int | None]:
    """What it said and its exit code; None: it was still running."""
    assert process.stdin and process.stdout
    try:
        with process.stdin as into:
            into.write(asked)
    except BrokenPipeError:
        pass  # its exit code says more
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with process.stdout as out:
        return out.read(_MOST), status


def _ending(status: int | None) -> str:
    if status is None or status == -signal.SIGXCPU:
        return "ran out of time"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "ended before its tests"
