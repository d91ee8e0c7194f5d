"""A real sshd on the loopback, of this user, with keys and files of its own."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
SSH = shutil.which("ssh")
ABSENT = "sshd or ssh is not installed (Debian: openssh-server, openssh-client)"
PRESENT = SSHD is not None and SSH is not None and shutil.which("ssh-keygen") is not None


@dataclass
class Sshd:
    """Sessions have their cache in `cache`; `client` goes before others on PATH, and is the real client."""

    folder: Path
    cache: Path
    port: int = 0
    process: subprocess.Popen = field(default=None, repr=False)

    @property
    def name(self):
        return f"ssh:{getuser()}@127.0.0.1:{self.port}"

    @property
    def client(self):
        return self.folder / "bin"

    @property
    def store(self):
        return self.cache / "mobile-export" / "device"

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host", "user", "stranger"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True
            )
        shutil.copyfile(self.folder / "user.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {self.folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nPermitRootLogin yes\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv XDG_CACHE_HOME={self.cache}\n"
        )
        host = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host}")
        self.client.mkdir()
        self.identify("user")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = self.folder / "log"
        self.process = subprocess.Popen([SSHD, "-D", "-E", log, "-f", self.folder / "sshd_config"])
        for _ in range(100):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(log.read_text())

    def identify(self, key):
        """The client on PATH is the real one with this test's keys."""
        options = (
            f"-i {self.folder}/{key} -o IdentitiesOnly=yes -o UserKnownHostsFile={self.folder}/known_hosts"
        )
        script = self.client / "ssh"
        script.write_text(f'#!/bin/sh\nexec {SSH} -F none {options} "$@"\n')
        script.chmod(0o755)

    def cut(self):
        """Kill every session's process, as a power cut of the device would end them."""
        for one in self.children():
            with suppress(psutil.NoSuchProcess):
                if "sshd" in one.name():
                    one.kill()

    def children(self):
        """All processes of all sessions."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stop(self):
        self.cut()
        self.process.kill()
        self.process.wait()

    def left(self):
        """What is there of copies that did not end and of runs."""
        return [
            str(path.relative_to(self.store))
            for pattern in ("files/*.part", "runs/*", "venvs/*")
            for path in self.store.glob(pattern)
        ]
