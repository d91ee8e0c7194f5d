"""Another machine through this one's own OpenSSH client: its keys, its known hosts, its configuration."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from typing import IO

from mobile_export.errors import ExportError

_ADDRESS = re.compile(
    r"(?P<user>[\w.][\w.-]*)@(?P<host>[\w.][\w.-]*|\[[0-9A-Fa-f:.%\w]+\])(:(?P<port>\d{1,5}))?"
)
_LOST = 255
"""The client's exit code for its own failures; a remote program's death by a signal is kept apart."""
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "LogLevel=ERROR",
)
_KEEP_CODE = '"$@"; exit $?'


@dataclass(frozen=True)
class Remote:
    """`user@host`, and a port where it is not the configured one."""

    destination: str
    port: str = ""

    def command(self, *words: str) -> tuple[str, ...]:
        """What to run here so that `words` run there; a death by a signal is exit code 128 + signal."""
        options = [part for option in _OPTIONS for part in ("-o", option)]
        port = ("-p", self.port) if self.port else ()
        return ("ssh", *options, *port, self.destination, shlex.join(("sh", "-c", _KEEP_CODE, "sh", *words)))

    def script(self, text: str, *words: str) -> tuple[str, ...]:
        """The same for a shell script and its arguments."""
        return self.command("sh", "-c", text, "sh", *words)

    def run(self, text: str, *words: str, given: IO[bytes] | int = subprocess.DEVNULL) -> str:
        """Run a shell script there, `given` as its input, and return what it printed.

        ExportError: no connection, or the script failed, with the last line it said.
        """
        done = subprocess.run(self.script(text, *words), stdin=given, capture_output=True)
        if done.returncode:
            raise self.error(done.returncode, done.stderr)
        return done.stdout.decode(errors="replace")

    def error(self, code: int, said: bytes) -> ExportError:
        """What a failed command means, in one line."""
        last = (said.decode(errors="replace").strip().splitlines() or [""])[-1].strip()
        if code != _LOST:
            return ExportError(
                f"'{self.destination}' failed: {last or f'exit code {code}'}",
                "mend that there, then run it again",
            )
        by_hand = f"make `ssh {self.destination}` work without a password, then run it again"
        if "Permission denied" in last:
            return ExportError(f"'{self.destination}' does not accept this user's key", by_hand)
        if "Host key verification failed" in last or "known_hosts" in last:
            return ExportError(f"'{self.destination}' is not a known host, or its key has changed", by_hand)
        reason = last.removeprefix("ssh: ") or "it was cut off"
        return ExportError(
            f"the connection to '{self.destination}' failed: {reason}",
            "look after the device, then run it again",
        )

    @property
    def gone(self) -> dict[int, ExportError]:
        """For `Launch.gone`."""
        lost = f"the connection to '{self.destination}' was lost"
        return {_LOST: ExportError(lost, "look after the device, then run it again")}


def parse(address: str) -> Remote:
    """`pi@board:22` -> Remote. ExportError: no such form, or there is no OpenSSH client."""
    found = _ADDRESS.fullmatch(address)
    if not found or not 0 < int(found["port"] or 22) < 65536:
        raise ExportError(f"'{address}' names no user, host and port", "write ssh:USER@HOST[:PORT]")
    if not shutil.which("ssh"):
        raise ExportError("there is no `ssh` on this machine", "install OpenSSH's client")
    host = found["host"].strip("[]")
    return Remote(f"{found['user']}@{host}", found["port"] or "")
