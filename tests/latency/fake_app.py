"""The sample app's side of docs/device-contract.md, for tests: it measures nothing.

Every time in its reports is made up and every report says that its phone is fake.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mobile_export.latency import contract
from mobile_export.latency.contract import (
    App,
    Check,
    DeviceReport,
    Error,
    FirstToken,
    Load,
    Memory,
    Phone,
    Request,
    State,
    Turn,
)

TICK = 1_000_000


class Crash(Exception):
    """The process ends here."""


@dataclass
class FakeApp:
    """An installed app. `read` gives a file's bytes or None; `write` keeps the report."""

    measure: str = "pss"
    kind: str = "fake"
    thermal: tuple[str, ...] = ("none",)
    """By round; the last one stays."""
    crash_in: str = ""
    """What it does when it crashes."""
    crash_after: int = 1
    """Rounds before that."""
    failure: tuple[str, str] | None = None
    """Code and message of the error it reports."""
    changes_its_mind: bool = False
    """Says something else in the second round."""
    wrong: bool = False
    """Does not say what the selftest says."""
    done: list[str] = field(default_factory=list)

    def run(self, data: bytes, read: Callable[[str], bytes | None], write: Callable[[bytes], None]) -> None:
        """One launch: the request's bytes to its last report."""
        request = msgspec.json.decode(data, type=Request)
        self.done.append(request.do)
        manifest = read(f"{request.bundle}/manifest.json") or b""
        report = DeviceReport(
            run=request.run,
            do=request.do,
            manifest=hashlib.sha256(manifest).hexdigest(),
            threads=request.threads,
            status="running",
            app=App(version="0", runtime="none", runtime_version="0", options={"flavour": "fake"}),
            phone=Phone(
                kind=self.kind,
                model="Nobody Fake",
                soc="none",
                system="Android 16 (API 36)",
                cores=8,
                memory_bytes=8 << 30,
            ),
        )

        def keep(**more: Any) -> None:
            nonlocal report
            report = msgspec.structs.replace(report, **more)
            write(contract.encode(report))

        keep()
        error = self._damage(request, manifest, read)
        if error is None and self.failure and self.failure[0] != "out-of-memory":
            error = Error(code=self.failure[0], message=self.failure[1])
        if error is not None:
            keep(status="failed", error=error)
            return
        selftest = json.loads(read(f"{request.bundle}/selftest.json") or b"{}")
        getattr(self, "_" + request.do.replace("-", "_"))(request, selftest, keep)
        if self.crash_in == request.do:
            raise Crash
        keep(status="done")

    def _damage(self, request: Request, manifest: bytes, read: Callable[[str], bytes | None]) -> Error | None:
        if hashlib.sha256(manifest).hexdigest() != request.manifest:
            return Error(code="bundle-missing", message="there is no such manifest")
        for name, file in json.loads(manifest)["files"].items():
            if hashlib.sha256(read(f"{request.bundle}/{name}") or b"").hexdigest() != file["sha256"]:
                return Error(code="bundle-damaged", message=f"{name} is not the manifest's")
        return None

    def _check(self, request: Request, selftest: dict, keep: Callable) -> None:
        change = 1 if self.wrong else 0
        cases = [
            Check(case=case["name"], tokens=tuple(token + change for token in case["greedy"]))
            for case in selftest["cases"]
        ]
        keep(checks=tuple(cases))

    def _load(self, request: Request, selftest: dict, keep: Callable) -> None:
        loads = [
            Load(kind="cold", open_ns=20 * TICK, answer_ns=5 * TICK, cached=0.0),
            Load(kind="warm", open_ns=10 * TICK, answer_ns=5 * TICK, cached=1.0),
        ]
        keep(loads=tuple(loads))

    def _turns(self, request: Request, selftest: dict, keep: Callable) -> None:
        turns, states = [], []
        for number in range(request.rounds):
            if (self.crash_in, self.crash_after) == ("turns", number):
                raise Crash
            states.append(self._state(number, "before"))
            for index, regime in enumerate(request.regimes):
                said = 100 + (number if self.changes_its_mind else 0)
                turns.append(
                    Turn(
                        round=number,
                        regime=index,
                        prefill_ns=TICK * len(regime.prompt),
                        decode_ns=(2 * TICK,) * regime.decode,
                        tokens=(said,) * (regime.decode + bool(regime.prompt)),
                        cpu_ns=TICK,
                    )
                )
            states.append(self._state(number, "after"))
            keep(turns=tuple(turns), states=tuple(states))

    def _state(self, number: int, when: str) -> State:
        return State(
            round=number,
            when=when,
            thermal=self.thermal[min(number, len(self.thermal) - 1)],
            governor="schedutil",
            mhz=(1800.0,) * 4 + (2800.0,) * 4,
            battery_percent=80,
            battery_celsius=30.5,
            charging=True,
        )

    def _first_token(self, request: Request, selftest: dict, keep: Callable) -> None:
        ids = tuple(range(5, 25))[: request.text_tokens]
        keep(
            first_tokens=tuple(
                FirstToken(round=number, ids=ids, tokenize_ns=TICK, prefill_ns=9 * TICK, token=100)
                for number in range(request.rounds)
            )
        )

    def _long_run(self, request: Request, selftest: dict, keep: Callable) -> None:
        keep(
            turns=tuple(
                Turn(
                    round=number,
                    regime=0,
                    prefill_ns=0,
                    decode_ns=((2 + number) * TICK,) * request.regimes[0].decode,
                    tokens=(100,) * request.regimes[0].decode,
                )
                for number in range(3)
            ),
            states=(self._state(0, "before"), self._state(0, "after")),
        )

    def _memory(self, request: Request, selftest: dict, keep: Callable) -> None:
        if self.failure and self.failure[0] == "out-of-memory":
            keep(status="failed", error=Error(code=self.failure[0], message=self.failure[1]))
            raise Crash
        keep(memory=Memory(measure=self.measure, peak_bytes=600 << 20, floor_bytes=50 << 20))
