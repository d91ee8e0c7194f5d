"""How a bench measures, and what a device answers: raw nanoseconds, where and on what."""

from __future__ import annotations

import statistics
from typing import Literal

import msgspec


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all parts of a report have in common."""


class Regime(Table, frozen=True):
    """What one turn does: `prompt` tokens in one call from an empty cache, then `decode` calls of one token.

    Token ids are fixed (`token_ids`), the next token is the most likely one, and no token ends the
    turn. Without a prompt the first decoded token is the fixed one. Decoding is at depth `prompt`.
    """

    prompt: int
    decode: int = 0


REGIMES = (
    Regime(prompt=32),
    Regime(prompt=128),
    Regime(prompt=512),
    Regime(prompt=0, decode=128),
    Regime(prompt=1024, decode=128),
)
TEXT = """The lighthouse keeper wrote every evening which ships had passed, how the wind stood, and
whether the lamp had burned without a pause. On the last page of the year he added a table: months in
rows, ships in columns, and below it the sum. Write a function in Python that reads such a table from
a file, one line a month, adds up each column, and returns the name of the ship that passed most often.
It must not fail when a line is empty or a number is missing; say in one sentence how it is tested."""


class Protocol(Table, frozen=True):
    """How it is measured. Each round runs each regime once with each contender, one after another."""

    rounds: int = 5
    """Kept; one shortened round before them is not."""
    threads: tuple[int, ...] = (1, 2)
    cpus: tuple[int, ...] = ()
    """Cores that the runtimes are pinned to; empty: the system chooses."""
    regimes: tuple[Regime, ...] = REGIMES
    text: str = TEXT
    """What the time to the first token is taken of; as many of its tokens as the context holds."""
    loads: int = 3
    """Fresh processes, each of which loads once cold and once warm."""
    settle_seconds: float = 0.2
    """Between two turns, so that one runtime's threads sleep before the other's work."""
    long_seconds: float = 60.0
    """The long run's least length, with the most threads; 0: no long run."""
    long_regime: Regime = Regime(prompt=0, decode=128)


class Machine(Table, frozen=True):
    """The machine that ran it."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    versions: dict[str, str]
    """Of Python, the runtimes and what they stand on, on that machine."""


class Contender(Table, frozen=True):
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
    not_speed: str = ""
    """Why its times are no speed, e.g. `evaluated, not run`; it is then checked and never timed."""


class Load(Table, frozen=True):
    """A fresh process, its imports done, opens an artefact and makes its first answer."""

    contender: str
    threads: int
    kind: Literal["cold", "warm"]
    """Cold: the system was told to drop the artefact's files from its page cache (`POSIX_FADV_DONTNEED`)."""
    ns: int
    cached: float | None
    """Share of the artefact in the page cache just before; None where the system does not tell."""


class Memory(Table, frozen=True):
    """Largest resident memory of a process that only ran each regime once, mapped file pages included.

    Proportional set size on Android, physical footprint on iOS.
    """

    contender: str
    threads: int
    floor_bytes: int
    """Resident before the artefact was opened: interpreter, libraries."""
    peak_bytes: int


class Turn(Table, frozen=True):
    """One regime, run once."""

    contender: str
    threads: int
    round: int
    prompt: int
    prefill_ns: int
    decode_ns: tuple[int, ...]
    """Each token's own time; the most likely token is picked in it."""
    tokens: tuple[int, ...]
    """What the model said, the token after the last decoded one too."""
    cpu_ns: int | None = None
    """Processor time of the runtime's process in this turn, all its threads. This and what follows is
    None where the system does not tell."""
    idle_ns: int | None = None
    idle_cpu_ns: int | None = None
    """Processor time that process took in the `idle_ns` before this turn, when others had theirs."""
    others: float | None = None
    """Cores kept busy by anything else during the turn."""


class Bandwidth(Table, frozen=True):
    """Reading memory far larger than the caches, in order."""

    threads: int
    bytes: int
    ns: tuple[int, ...]

    @property
    def per_second(self) -> float:
        """Bytes a second, median."""
        return self.bytes / statistics.median(self.ns) * 1e9


class Quality(Table, frozen=True):
    """A contender against the fp32 source on the golden's prompts."""

    contender: str
    positions: int
    kl_mean: float | None
    top1: float
    greedy_mean: float | None
    """Tokens of the source's greedy continuation that are said too, before the first that is not."""
    greedy_tokens: int
    """Tokens in each continuation."""


class DeviceInfo(Table, frozen=True):
    """What it was measured on, as the user named it."""

    name: str
    """E.g. `host` or `ssh:pi@board`."""
    kind: str
    """`host`, `ssh`, `adb`, `ios` or `qemu-arm64`."""
    not_speed: str = ""
    """Why nothing measured there is a speed, e.g. `emulated by qemu`; empty on real hardware."""


class Battery(Table, frozen=True):
    """A device's battery."""

    percent: float
    charging: bool
    celsius: float | None = None


class State(Table, frozen=True):
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
    """The system's own word: Android's or iOS's status; on Linux what holds clocks down, or `none`."""
    battery: Battery | None = None
    load_average: float | None = None
    """Over one minute; our own rounds are in it."""
    busy: float | None = None
    """Cores that others kept busy."""


class FirstToken(Table, frozen=True):
    """From a text to the first token of its answer, from an empty cache."""

    contender: str
    threads: int
    round: int
    tokens: int
    """Of the text."""
    tokenize_ns: int
    prefill_ns: int
    """From token ids to the first answered token, picked."""


class LongRun(Table, frozen=True):
    """One regime over and over without a pause: a device that gets hot gets slower."""

    contender: str
    threads: int
    decode_ns: tuple[tuple[int, ...], ...]
    """Tokens of each repetition, all from the same depth."""


class Check(Table, frozen=True):
    """A contender on that device against its bundle's selftest."""

    contender: str
    threads: int
    matched: int
    """Greedy tokens that are the source's, before the first that is not, over all cases; an emulator or
    evaluator is asked for few of each."""
    expected: int
    """The same, as exported."""

    def words(self) -> str:
        """Both counts, for a person."""
        return f"{self.matched} of the source's tokens, at export {self.expected}"


class Samples(Table, frozen=True):
    """What a device measured of contenders."""

    machine: Machine
    states: tuple[State, ...] = ()
    checks: tuple[Check, ...] = ()
    loads: tuple[Load, ...] = ()
    memory: tuple[Memory, ...] = ()
    turns: tuple[Turn, ...] = ()
    first_tokens: tuple[FirstToken, ...] = ()
    long_runs: tuple[LongRun, ...] = ()
    bandwidth: tuple[Bandwidth, ...] = ()


def token_ids(length: int, vocab: int) -> list[int]:
    """The fixed token ids of a prompt; all of them exist, none of them means anything."""
    return [7 + 31 * index % min(vocab - 7, 997) for index in range(length)]
