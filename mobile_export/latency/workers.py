"""This end of a worker: a process per artefact and thread count, JSON lines over its pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np

ANSWER_SECONDS = 600.0
"""A worker that has not answered by then is stopped."""


@dataclass(frozen=True)
class Launch:
    """How a contender's worker is started, and what it opens."""

    name: str
    command: tuple[str, ...]
    spec: dict[str, Any]
    """For `worker.runner`: `kind`, `path`, the artefact's `files` in it, and that kind's options."""
    env: dict[str, str] = field(default_factory=dict)
    gone: dict[int, ExportError] = field(default_factory=dict)
    """What an exit code of `command` (-N: signal N) means, where it is not the worker's own."""


class Worker:
    """A running worker. A context manager: its process ends with the block, whatever happens."""

    def __init__(self, launch: Launch) -> None:
        self.name = launch.name
        self._launch = launch
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            launch.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **launch.env},
        )
        self._late = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def open(self, threads: int) -> dict[str, Any]:
        """Open the artefact: `ns` it took, `vocab`, `context`."""
        return self.ask("open", spec=self._launch.spec, threads=threads)

    def with_artefact(self, request: str, **arguments: Any) -> dict[str, Any]:
        """A request that opens the artefact itself."""
        return self.ask(request, spec=self._launch.spec, **arguments)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer. ExportError when the worker refuses, dies or hangs."""
        assert self._process.stdin and self._process.stdout
        timer = threading.Timer(ANSWER_SECONDS + arguments.get("seconds", 0), self._stop)
        timer.start()
        try:
            print(json.dumps({"do": request, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise self._died(request)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(f"failed at '{request}': {answer['error']}")
        return answer

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def _died(self, request: str) -> ExportError:
        code = self._process.wait()
        if code in self._launch.gone and not self._late:
            return self._launch.gone[code]
        how = _signal(-code if code < 0 else code - 128) or f"exit code {code}"
        if self._late:
            how = f"no answer in {ANSWER_SECONDS:.0f} s"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        return self._error(": ".join([f"died at '{request}' ({how})", *last]))

    def _error(self, what: str) -> ExportError:
        return ExportError(
            f"the worker of '{self.name}' {what}", "check that artefact and its runtime, then run it again"
        )


def _signal(number: int) -> str:
    """The signal's name, which a shell tells as exit code 128 + number; empty: there is no such signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


class RemoteRunner:
    """A `Runner` over a worker that has opened its artefact; logits come through a file."""

    def __init__(self, worker: Worker, opened: dict[str, Any]) -> None:
        self._worker = worker
        self.vocab, self.context = int(opened["vocab"]), int(opened["context"])

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]."""
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "logits"
            self._worker.ask("logits", tokens=list(tokens), start=start, file=str(file))
            return np.fromfile(file, np.float32).reshape(len(tokens), self.vocab)

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]."""
        return self.logits(tokens, start)[-1]

    def reset(self) -> None:
        """Forget the cache."""
        self._worker.ask("reset")
