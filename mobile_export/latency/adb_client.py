"""One Android device through the adb binary: files, commands, and what their failures mean.

adb itself starts a server where none runs, and finds it as it always does (ADB_SERVER_SOCKET,
ANDROID_ADB_SERVER_PORT). Device listings: SERVICES.TXT of adb.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobile_export.errors import ExportError

QUERY_SECONDS = 60.0
COPY_SECONDS = 1800.0
_STATES = {
    "offline": "plug it in again, or run `adb reconnect`",
    "unauthorized": "unlock it and confirm this computer in the dialog on its screen",
    "authorizing": "unlock it and confirm this computer in the dialog on its screen",
    "no permissions": "give your user access to its USB device (udev rules), then run `adb kill-server`",
}
_LINE = re.compile(
    r"(.+?)\s+(device|offline|unauthorized|authorizing|no permissions|connecting|recovery|sideload|bootloader"
    r"|rescue|host|unknown)\b(.*)"
)
_OTHER_STATE = "start Android on it and switch on USB debugging"


@dataclass(frozen=True)
class Listed:
    """A line of `adb devices -l`."""

    serial: str
    state: str
    """`device` when it is ready."""
    model: str = ""

    @property
    def hint(self) -> str:
        """What to do about its state; empty when it is ready."""
        return "" if self.state == "device" else _STATES.get(self.state, _OTHER_STATE)


def binary() -> str | None:
    """The adb on PATH."""
    return shutil.which("adb")


def listed(adb: str, seconds: float = QUERY_SECONDS) -> list[Listed]:
    """All devices that adb knows of, ready or not. ExportError: adb itself fails."""
    done = _run([adb, "devices", "-l"], seconds)
    if done.returncode:
        raise ExportError(f"adb fails: {_last(done)}", "run `adb kill-server`, then `adb devices`")
    lines = done.stdout.partition("List of devices attached\n")[2].splitlines()
    return [_listed(line) for line in lines if line.strip()]


def _listed(line: str) -> Listed:
    """A serial may hold spaces (wireless debugging), and so does one state."""
    found = _LINE.match(line)
    serial, state, rest = found.groups() if found else (*line.split(None, 1), "")
    words = dict(word.split(":", 1) for word in rest.split() if ":" in word)
    return Listed(serial, state, words.get("model", "").replace("_", " "))


def choose(devices: Sequence[Listed], serial: str) -> Listed:
    """The device of that serial, or the only one. ExportError: none, several, or not ready."""
    named = [one for one in devices if one.serial == serial] if serial else list(devices)
    if serial and not named:
        there = ", ".join(one.serial for one in devices) or "none"
        raise ExportError(f"adb has no device '{serial}'", f"plug it in; there now: {there}")
    if not named:
        raise ExportError("adb has no device", "plug in a phone with USB debugging switched on")
    if len(named) > 1:
        names = " or ".join(f"adb:{one.serial}" for one in named)
        raise ExportError(f"adb has {len(named)} devices", f"name one: --device {names}")
    if named[0].hint:
        raise ExportError(f"device {named[0].serial} is {named[0].state}", named[0].hint)
    return named[0]


class Client:
    """A device that was ready a moment ago. Each method raises ExportError when it no longer is."""

    def __init__(self, adb: str, serial: str) -> None:
        self._adb, self.serial = adb, serial

    def shell(self, *words: str, check: bool = True) -> str:
        """What a command on the device prints; with `check` it must exit with 0."""
        done = self._do("shell", shlex.join(words), seconds=QUERY_SECONDS)
        if done.returncode and (check or _unreachable(done)):
            raise self._error(f"'{words[0]}' failed", done)
        return done.stdout

    @contextmanager
    def lines(self, *words: str) -> Iterator[Iterator[str]]:
        """What a long command prints, line by line. Its client is stopped when the block ends."""
        command = [self._adb, "-s", self.serial, "shell", shlex.join(words)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout
        try:
            yield iter(process.stdout)
        finally:
            process.kill()
            process.communicate()

    def sha256(self, paths: Sequence[str]) -> dict[str, str]:
        """Of those files that are there."""
        lines = self.shell("sha256sum", *paths, check=False).splitlines()
        return {path: digest for digest, _, path in (line.partition("  ") for line in lines) if path}

    def push(self, path: Path, there: str) -> None:
        """Copy a file to the device."""
        done = self._do("push", str(path), there, seconds=COPY_SECONDS)
        if done.returncode:
            raise self._error(f"the copy of '{path.name}' was cut off", done)

    def pull(self, there: str, path: Path) -> None:
        """Copy a file from the device."""
        done = self._do("pull", there, str(path), seconds=COPY_SECONDS)
        if done.returncode or not path.is_file():
            raise self._error(f"the copy of '{Path(there).name}' from it was cut off", done)

    def _do(self, *words: str, seconds: float) -> subprocess.CompletedProcess[str]:
        return _run([self._adb, "-s", self.serial, *words], seconds)

    def _error(self, what: str, done: subprocess.CompletedProcess[str]) -> ExportError:
        said = done.stderr + done.stdout
        if "No space left" in said:
            return ExportError(f"device {self.serial} is full: {what}", "free some space on it")
        # adb says nothing at all where the connection ends in the middle of a file.
        state = next((one for one in listed(self._adb) if one.serial == self.serial), None)
        if state is None or state.hint:
            how = state.state if state else "gone"
            hint = f"{state.hint if state else 'plug it in again'}; then run it again: what was copied stays"
            return ExportError(f"device {self.serial} is {how}: {what}", hint)
        return ExportError(f"device {self.serial}: {what}: {_last(done)}", "check the cable and run it again")


def _unreachable(done: subprocess.CompletedProcess[str]) -> bool:
    """The client's own failure, not that of a command on the device."""
    return done.stderr.startswith(("error: ", "adb: "))


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"adb gave no answer in {seconds:.0f} s", "plug the phone in again, and run `adb kill-server`"
        ) from None


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """One line of what adb said: its error, else the first one."""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("adb: ", "error: "))]
    line = (errors or lines or [f"exit code {done.returncode}"])[0].strip()
    return line.removeprefix("adb: ").removeprefix("error: ")
