"""What a bench measured: raw nanoseconds, where and on what. JSON in, JSON out, versioned."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

import msgspec

from mobile_export.errors import ExportError
from mobile_export.files import write_file

FORMAT, SCHEMA_VERSION = "mobile-export-bench", 1
Speed = Literal["prefill", "decode"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Regime(_Table, frozen=True):
    """What one turn does: `prompt` tokens in one call from an empty cache, then `decode` calls of one token.

    Token ids are fixed, the next token is the most likely one, and no token ends the turn.
    """

    prompt: int
    decode: int = 0


class Protocol(_Table, frozen=True):
    """How the turns were run. Each round runs each regime once with each contender, one after another."""

    rounds: int
    threads: tuple[int, ...]
    regimes: tuple[Regime, ...]
    loads: int
    """Fresh processes that load times are medians of."""
    settle_seconds: float
    """Between two turns, so that one runtime's threads sleep before the other's work."""
    device: str = "host"


class Machine(_Table, frozen=True):
    """The machine that ran it."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    governor: str
    """`unknown` where the system does not tell, as in most virtual machines."""
    versions: dict[str, str]


class Contender(_Table, frozen=True):
    """One artefact in one runtime with one set of options."""

    name: str
    runtime: str
    peer: bool
    """Somebody else's runtime, which ours are compared with."""
    file_bytes: int
    model: str
    """Digest of the checkpoint: contenders of one bench carry one model."""
    options: dict[str, str]
    """Versions, flags and settings, as the reader needs them to run it again."""


class Load(_Table, frozen=True):
    """A fresh process opens an artefact and makes its first answer: imports done, file in the page cache."""

    contender: str
    threads: int
    ns: int
    floor_bytes: int
    """Resident before that: interpreter, libraries, what a first opening left behind."""


class Memory(_Table, frozen=True):
    """Largest resident memory of the process that ran all turns, mapped file pages included."""

    contender: str
    threads: int
    peak_bytes: int


class Round(_Table, frozen=True):
    """What the machine was doing just before a round, when nothing of ours ran."""

    threads: int
    round: int
    load_average: float
    """Over one minute; our own rounds are in it."""
    busy: float
    """Cores that others kept busy."""


class Turn(_Table, frozen=True):
    """One regime, run once."""

    contender: str
    threads: int
    round: int
    prompt: int
    prefill_ns: int
    decode_ns: tuple[int, ...]
    """Each token's own time; the most likely token is picked in it."""
    tokens: tuple[int, ...]
    """What the model said."""
    cpu_ns: int
    """Processor time of the runtime's process in this turn, all its threads."""
    idle_ns: int
    idle_cpu_ns: int
    """Processor time that process took in the `idle_ns` before this turn, when others had theirs."""
    others: float
    """Cores kept busy by anything else during the turn."""


class Bandwidth(_Table, frozen=True):
    """Reading memory far larger than the caches, in order."""

    threads: int
    bytes: int
    ns: tuple[int, ...]

    @property
    def per_second(self) -> float:
        """Bytes a second, median."""
        return self.bytes / statistics.median(self.ns) * 1e9


class Quality(_Table, frozen=True):
    """A contender against the fp32 source on the golden's prompts."""

    contender: str
    positions: int
    kl_mean: float | None
    top1: float
    greedy_mean: float | None
    """Tokens of the source's greedy continuation that are said too, before the first that is not."""
    greedy_tokens: int
    """Tokens in each continuation."""


class DeviceInfo(_Table, frozen=True):
    """What it was measured on, as the user named it."""

    name: str
    """E.g. `host` or `ssh:pi@board`."""
    kind: str
    """`host`, `ssh`, `adb`, `ios` or `qemu-arm64`."""
    not_speed: str = ""
    """Why nothing measured there is a speed, e.g. `emulated by qemu`; empty on real hardware."""


class Battery(_Table, frozen=True):
    """A device's battery."""

    percent: float
    charging: bool
    celsius: float | None = None


class State(_Table, frozen=True):
    """The device just before or after a round (or the long run: round -1), when nothing of ours ran.

    What a system does not tell is empty, None or `unknown`.
    """

    threads: int
    round: int
    when: Literal["before", "after"]
    governor: str = "unknown"
    mhz: tuple[float, ...] = ()
    """Each core's clock."""
    celsius: dict[str, float] = {}
    """By sensor."""
    thermal: str = "unknown"
    """The system's own word: Android's or iOS's thermal status; `throttled` or `none` on Linux."""
    battery: Battery | None = None
    load_average: float | None = None
    """Over one minute; our own rounds are in it."""
    busy: float | None = None
    """Cores that others kept busy."""


class FirstToken(_Table, frozen=True):
    """From a text to the first token of its answer, from an empty cache."""

    contender: str
    threads: int
    round: int
    tokens: int
    """Of the text."""
    tokenize_ns: int
    prefill_ns: int
    """From token ids to the first answered token, picked."""


class LongRun(_Table, frozen=True):
    """One regime over and over without a pause: a device that gets hot gets slower."""

    contender: str
    threads: int
    decode_ns: tuple[tuple[int, ...], ...]
    """Tokens of each repetition, all from the same depth."""


class Check(_Table, frozen=True):
    """A contender on that device against its bundle's selftest."""

    contender: str
    threads: int
    matched: int
    """Greedy tokens that are the source's, before the first that is not, over all cases."""
    expected: int
    """The same, as exported."""


class Samples(_Table, frozen=True):
    """What a device measured of contenders."""

    machine: Machine
    states: tuple[State, ...] = ()
    checks: tuple[Check, ...] = ()
    loads: tuple[Load, ...] = ()
    memory: tuple[Memory, ...] = ()
    turns: tuple[Turn, ...] = ()
    first_tokens: tuple[FirstToken, ...] = ()
    long_runs: tuple[LongRun, ...] = ()


class Report(_Table, frozen=True):
    """One run of the bench."""

    started: str
    """UTC, ISO 8601."""
    machine: Machine
    protocol: Protocol
    contenders: tuple[Contender, ...]
    rounds: tuple[Round, ...]
    loads: tuple[Load, ...]
    memory: tuple[Memory, ...]
    turns: tuple[Turn, ...]
    bandwidth: tuple[Bandwidth, ...]
    quality: tuple[Quality, ...] = ()
    format: Literal["mobile-export-bench"] = "mobile-export-bench"
    schema_version: Literal[1] = 1

    def speeds(self, contender: str, threads: int, what: Speed, prompt: int) -> list[float]:
        """Tokens a second in each round, in order: of the prompt, or of the tokens after it."""
        turns = [
            turn
            for turn in self.turns
            if (turn.contender, turn.threads, turn.prompt) == (contender, threads, prompt)
        ]
        if what == "prefill":
            return [turn.prompt / turn.prefill_ns * 1e9 for turn in turns]
        return [len(turn.decode_ns) / sum(turn.decode_ns) * 1e9 for turn in turns if turn.decode_ns]


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    write_file(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def load(path: Path) -> Report:
    """Read a report. ExportError: it is not one, or of another version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise ExportError(f"cannot read '{path.name}': {error.strerror}", "check the path") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(
            f"'{path.name}' is no bench report of this version: {error}", "run the bench again"
        ) from None
