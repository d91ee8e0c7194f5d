"""An app's report: refused when it is not what was asked for, else turned into the bench's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mobile_export.errors import ExportError
from mobile_export.latency import contract, protocol
from mobile_export.latency.contract import DeviceReport, Request
from mobile_export.latency.protocol import Battery

_APP = "see docs/device-contract.md, and mend the app"
_HINTS: dict[contract.ErrorCode, str] = {
    "request-unsupported": "install the app that belongs to this version of mobile-export",
    "bundle-missing": "run it again: the files are pushed anew",
    "bundle-damaged": "run it again: the files that differ are pushed anew",
    "bundle-unsupported": "install the app with the runtime that the bundle's manifest names",
    "load-failed": "check the bundle with `mobile-export lint`",
    "run-failed": "check the bundle with `mobile-export parity`",
    "out-of-memory": "close other apps, or export with a smaller --context",
    "device-locked": "unlock the phone, keep its screen on, and run it again",
    "left-foreground": "leave the phone alone while it measures, and run it again",
}


@dataclass(frozen=True)
class Look:
    """What the host reads of a phone between launches."""

    thermal: str | None = None
    celsius: dict[str, float] = field(default_factory=dict)
    battery: Battery | None = None


def refuse(name: str, request: Request, report: DeviceReport) -> None:
    """ExportError: the report is of something else, not finished, or lacks what was asked for."""
    if report.error is not None:
        raise ExportError(
            f"'{name}': the app could not do '{request.do}'{reached(request, report)}: "
            f"{' '.join(report.error.message.split())} ({report.error.code})",
            _HINTS[report.error.code],
        )
    wanted = (request.run, request.do, request.manifest, request.threads, "done")
    if (report.run, report.do, report.manifest, report.threads, report.status) != wanted:
        what = f"ended as '{report.status}'" if report.status != "done" else "is of another request"
        raise ExportError(
            f"'{name}': the report of '{request.do}'{reached(request, report)} {what}",
            _APP,
        )
    if lacking := _lacking(request, report):
        raise ExportError(
            f"'{name}': the report of '{request.do}' lacks {lacking}",
            _APP,
        )


def reached(request: Request, report: DeviceReport) -> str:
    """How far a run of several rounds came."""
    if request.do != "turns":
        return ""
    done = len(report.turns) // max(len(request.regimes), 1)
    return f" after {done} of {request.rounds} rounds"


def _lacking(request: Request, report: DeviceReport) -> str:
    """What the report must hold and does not."""
    rounds = list(range(request.rounds))
    if request.do == "turns":
        wanted = [(number, index) for number in rounds for index in range(len(request.regimes))]
        if [(turn.round, turn.regime) for turn in report.turns] != wanted:
            return "turns"
        if [state.round for state in report.states if state.when == "before"] != rounds:
            return "states"
    held: dict[contract.Do, Sequence[object]] = {
        "check": report.checks,
        "load": report.loads,
        "turns": report.turns,
        "first-token": report.first_tokens,
        "long-run": report.turns,
        "memory": [report.memory] if report.memory else [],
    }
    if not held[request.do]:
        return "its samples"
    if request.do == "first-token" and [one.round for one in report.first_tokens] != rounds:
        return "rounds"
    for turn in report.turns if request.do in ("turns", "long-run") else ():
        regime = request.regimes[turn.regime] if turn.regime < len(request.regimes) else None
        if regime is None or len(turn.decode_ns) != regime.decode:
            return "decoded tokens"
        if len(turn.tokens) != regime.decode + bool(regime.prompt) or bool(turn.prefill_ns) != bool(
            regime.prompt
        ):
            return "a prompt's answer"
    return ""


def loads(name: str, report: DeviceReport) -> tuple[protocol.Load, ...]:
    """A cold and a warm one."""
    return tuple(
        protocol.Load(
            contender=name,
            threads=report.threads,
            kind=load.kind,
            ns=load.prepare_ns + load.open_ns + load.answer_ns,
            cached=load.cached,
        )
        for load in report.loads
    )


def turns(name: str, request: Request, report: DeviceReport, first: int) -> tuple[protocol.Turn, ...]:
    """`first` is the round that the report's first one is."""
    return tuple(
        protocol.Turn(
            contender=name,
            threads=report.threads,
            round=first + turn.round,
            prompt=len(request.regimes[turn.regime].prompt),
            prefill_ns=turn.prefill_ns,
            decode_ns=turn.decode_ns,
            tokens=turn.tokens,
            cpu_ns=turn.cpu_ns,
        )
        for turn in report.turns
    )


def first_tokens(name: str, report: DeviceReport, first: int) -> tuple[protocol.FirstToken, ...]:
    """`first` is the round that the report's first one is."""
    return tuple(
        protocol.FirstToken(
            contender=name,
            threads=report.threads,
            round=first + answer.round,
            tokens=len(answer.ids),
            tokenize_ns=answer.tokenize_ns,
            prefill_ns=answer.prefill_ns,
        )
        for answer in report.first_tokens
    )


def machine(report: DeviceReport) -> protocol.Machine:
    app, phone = report.app, report.phone
    versions = {"app": app.version, app.runtime: app.runtime_version}
    versions |= {f"{app.runtime}: {name}": value for name, value in app.options.items()}
    return protocol.Machine(
        cpu=phone.soc,
        cores=phone.cores,
        memory_bytes=phone.memory_bytes,
        system=f"{phone.model}, {phone.system}",
        versions=versions,
    )


def states(report: DeviceReport, first: int, before: Look, after: Look) -> tuple[protocol.State, ...]:
    """The app's, and what only the host reads in the first and the last of them; `first` as in `turns`."""
    found = []
    last = len(report.states) - 1
    for index, state in enumerate(report.states):
        look = before if index == 0 else after if index == last else Look()
        battery = look.battery
        if state.battery_percent is not None and state.charging is not None:
            battery = Battery(
                percent=state.battery_percent, charging=state.charging, celsius=state.battery_celsius
            )
        found.append(
            protocol.State(
                threads=report.threads,
                round=first if first < 0 else first + state.round,
                when=state.when,
                governor=state.governor or "unknown",
                mhz=state.mhz,
                celsius=look.celsius,
                thermal=state.thermal or look.thermal or "unknown",
                battery=battery,
            )
        )
    return tuple(found)


def heat(found: Sequence[protocol.State]) -> str:
    """Thermal words that are not a cool device's."""
    words = dict.fromkeys(state.thermal for state in found)
    hot = [word for word in words if word not in ("none", "nominal", "unknown")]
    return f"throttled: {', '.join(hot)}" if hot else ""
