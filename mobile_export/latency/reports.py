"""One run of the bench. JSON in, JSON out, versioned.

The schema file is generated from this: `python -m mobile_export.schemas`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from mobile_export.errors import ExportError
from mobile_export.files import write_file
from mobile_export.latency.protocol import Contender, DeviceInfo, Protocol, Quality, Samples, Turn

Speed = Literal["prefill", "decode"]


class Report(Samples, frozen=True, kw_only=True):
    """One run of the bench."""

    started: str
    """UTC, ISO 8601."""
    device: DeviceInfo
    protocol: Protocol
    contenders: tuple[Contender, ...]
    quality: tuple[Quality, ...] = ()
    format: Literal["mobile-export-bench"] = "mobile-export-bench"
    schema_version: Literal[2] = 2

    def not_speed(self, contender: Contender) -> str:
        """Why that contender's times in this report are no speed; empty: they are."""
        return contender.not_speed or self.device.not_speed

    def of(self, contender: str, threads: int, prompt: int) -> list[Turn]:
        """The turns of one regime, by round."""
        key = (contender, threads, prompt)
        return [turn for turn in self.turns if (turn.contender, turn.threads, turn.prompt) == key]

    def speeds(self, contender: str, threads: int, what: Speed, prompt: int) -> list[float]:
        """Tokens a second in each round, in order: of the prompt, or of the tokens after it."""
        turns = self.of(contender, threads, prompt)
        if what == "prefill":
            return [turn.prompt / turn.prefill_ns * 1e9 for turn in turns if turn.prompt]
        return [len(turn.decode_ns) / sum(turn.decode_ns) * 1e9 for turn in turns if turn.decode_ns]


def spread(values: Sequence[float]) -> float:
    """Half of highest less lowest."""
    return (max(values) - min(values)) / 2


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that at least `percent` of the values do not exceed."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


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
