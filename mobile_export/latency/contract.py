"""What `bench` and a phone's app say to each other: a request goes in, a report comes out, both JSON.

docs/device-contract.md tells the rest: names, paths, and how each platform's app is started. The
schema files are generated from these structs: `python -m mobile_export.schemas`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from mobile_export.errors import ExportError

SCHEMA_VERSION = 1
APP = "mobileexport.sample"
"""Application id on Android, bundle identifier on iOS."""
INSTRUMENTATION = f"{APP}/.BenchInstrumentation"

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(gt=0)]
Ids = tuple[Count, ...]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Do = Literal["check", "load", "turns", "first-token", "long-run", "memory"]
Kind = Literal["physical", "emulator", "simulator", "fake"]
ErrorCode = Literal[
    "request-unsupported",
    "bundle-missing",
    "bundle-damaged",
    "bundle-unsupported",
    "load-failed",
    "run-failed",
    "out-of-memory",
    "device-locked",
    "left-foreground",
]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Regime(_Table, frozen=True):
    """What one turn does, from an empty KV cache."""

    prompt: Ids
    """Fed in one call. May be empty: then decoding starts with `first`."""
    decode: Count = 0
    """Calls of one token after that, each with the most likely token; no token ends them."""
    first: Count = 0


class Request(_Table, frozen=True):
    """One thing to do in a fresh process of the app."""

    run: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    """Of this launch alone; names the report's folder."""
    do: Do
    bundle: str
    """The bundle's folder: absolute on Android, inside the app's data container on iOS."""
    manifest: Sha256
    """Of the bundle's manifest.json, which holds every other file's."""
    threads: Positive
    rounds: Positive = 1
    """For `turns` and `first-token`."""
    warmups: Count = 0
    """Rounds before those, not reported."""
    settle_ms: Count = 0
    """Pause before each turn."""
    regimes: tuple[Regime, ...] = ()
    """For `turns`, `long-run` and `memory`: run in this order in each round."""
    seconds: Count = 0
    """For `long-run`: repeat without a pause until so long has passed."""
    text: str = ""
    """For `first-token`."""
    text_tokens: Count = 0
    """Tokens kept of it, from its start."""
    hold_ms: Count = 0
    """For `memory`: how long to keep everything loaded at the end, so that the host can look."""
    format: Literal["mobile-export-device-request"] = "mobile-export-device-request"
    schema_version: Literal[1] = 1


class Error(_Table, frozen=True):
    """Why the app stopped."""

    code: ErrorCode
    message: str
    """One line."""


class App(_Table, frozen=True):
    """The app and the runtime in it."""

    version: str
    runtime: str
    runtime_version: str
    options: dict[str, str] = {}
    """What a reader needs to run it again: flavour of the runtime, compute units, kind of build."""


class Phone(_Table, frozen=True):
    """The device as the app sees it."""

    kind: Kind
    model: str
    """Maker and model."""
    soc: str
    system: str
    """Name, version and build."""
    cores: Positive
    memory_bytes: Positive


class Check(_Table, frozen=True):
    """A case of the bundle's selftest, continued greedily for as many tokens as it has in `greedy`."""

    case: str
    tokens: Ids


class Load(_Table, frozen=True, kw_only=True):
    """The artefact opened, and its first answer to one token."""

    kind: Literal["cold", "warm"]
    """Cold: the app told the system to drop the artefact's pages before it. Not all systems can (iOS)."""
    prepare_ns: Count = 0
    """Compiling for the device, where the runtime does that once and keeps the result (Core ML)."""
    open_ns: Positive
    answer_ns: Positive
    cached: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Share of the artefact in the page cache just before, if the app can tell."""


class Turn(_Table, frozen=True):
    """One regime, run once. Nanoseconds of a monotonic clock."""

    round: Count
    regime: Count
    """Its index in the request."""
    prefill_ns: Count
    """The prompt in one call and its most likely next token picked; 0 without a prompt."""
    decode_ns: tuple[Positive, ...]
    """Each token's own time, picking it included."""
    tokens: Ids
    """What the model said: to the prompt, if there is one, and to each decoded token."""
    cpu_ns: Count | None = None
    """Processor time of the process in this turn, all threads."""


class FirstToken(_Table, frozen=True):
    """A text tokenized and answered with one token, from an empty KV cache."""

    round: Count
    ids: Ids
    """What the tokenizer made of it, cut to `text_tokens`."""
    tokenize_ns: Positive
    prefill_ns: Positive
    token: Count


class Memory(_Table, frozen=True):
    """The largest memory of the process while it loads and runs each regime once."""

    measure: Literal["pss", "phys_footprint"]
    peak_bytes: Positive
    floor_bytes: Count
    """Before anything was loaded."""


class State(_Table, frozen=True):
    """The device before or after a round, when the model rests. What the system does not tell is left out."""

    round: Count
    when: Literal["before", "after"]
    thermal: str | None = None
    """The system's word in lower case: `none` ... `shutdown` on Android, `nominal` ... `critical` on iOS."""
    governor: str | None = None
    mhz: tuple[float, ...] = ()
    """Each core's clock."""
    battery_percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    battery_celsius: float | None = None
    charging: bool | None = None


class DeviceReport(_Table, frozen=True, kw_only=True):
    """What the app did of one request. Written anew after each round, so that a crash leaves the last one."""

    run: str
    """The request's."""
    do: Do
    manifest: Sha256
    """Of the manifest that the app read."""
    threads: Positive
    status: Literal["running", "done", "failed"]
    """Only `done` is a measurement."""
    error: Error | None = None
    app: App
    phone: Phone
    checks: tuple[Check, ...] = ()
    loads: tuple[Load, ...] = ()
    turns: tuple[Turn, ...] = ()
    first_tokens: tuple[FirstToken, ...] = ()
    memory: Memory | None = None
    states: tuple[State, ...] = ()
    format: Literal["mobile-export-device-report"] = "mobile-export-device-report"
    schema_version: Literal[1] = 1


class Inventory(_Table, frozen=True):
    """What an iOS app says that it has, after it has thrown away what is not what its name says."""

    run: str
    """That of the launch."""
    blobs: dict[Sha256, Count]
    """Bytes by sha256."""
    format: Literal["mobile-export-device-inventory"] = "mobile-export-device-inventory"
    schema_version: Literal[1] = 1


class _Head(msgspec.Struct):
    """What every version of a report has."""

    format: str = ""
    schema_version: int = 0


_Message = TypeVar("_Message", DeviceReport, Inventory)


def encode(message: Request | DeviceReport | Inventory) -> bytes:
    """Compact JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes) -> DeviceReport:
    """The app's report. ExportError: it is not one, or the app follows another version of the contract."""
    return _decode(data, DeviceReport, "report")


def decode_inventory(data: bytes) -> Inventory:
    """The app's inventory. Errors as in `decode`."""
    return _decode(data, Inventory, "inventory")


def _decode(data: bytes, struct: type[_Message], name: str) -> _Message:
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.format == f"mobile-export-device-{name}" and head.schema_version != SCHEMA_VERSION:
            raise ExportError(
                f"the app speaks version {head.schema_version} of the contract, not {SCHEMA_VERSION}",
                "install the app that belongs to this version of mobile-export",
            )
        return msgspec.json.decode(data, type=struct)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(
            f"the app's {name} does not keep to the contract: {error}",
            "see docs/device-contract.md, and mend the app",
        ) from None
