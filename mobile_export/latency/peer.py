"""The peer: llama.cpp in an environment of its own, with the same weights in Q8_0, at its best.

`ci/bench-peer.sh` installs it. Flash attention on and off are two contenders: which is faster
depends on machine and prompt, and ours are compared with the faster one of each column.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import mobile_export
from mobile_export.checkpoint import cache
from mobile_export.errors import ExportError
from mobile_export.latency import peer_gguf
from mobile_export.latency.devices import Entry
from mobile_export.latency.protocol import Contender
from mobile_export.latency.workers import Launch
from mobile_export.types import Checkpoint

NAME = "llama.cpp"
_INSTALL = "run ci/bench-peer.sh, or name its Python with --peer-python"
_WORKER = """
import importlib.util, sys
where = sys.argv[1]
first, all = where + "/__init__.py", [where]
found = importlib.util.spec_from_file_location("mobile_export", first, submodule_search_locations=all)
sys.modules["mobile_export"] = module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
from mobile_export.latency.worker import main
main()
"""
"""Of our environment the peer's Python sees this package alone."""
_PROBE = (
    "import importlib.metadata as m, llama_cpp as l;"
    "print(m.version('llama_cpp_python')); print(l.llama_print_system_info().decode().strip(' |'))"
)


def python(given: Path | None = None) -> Path:
    """The Python that has the peer: `given`, else where ci/bench-peer.sh puts it."""
    path = given or cache.root() / "peers" / NAME / "bin" / "python"
    if not path.is_file():
        raise ExportError(f"{NAME} is not installed", _INSTALL)
    return path


def contenders(checkpoint: Checkpoint, context: int, interpreter: Path) -> list[Entry]:
    """Flash attention off and on.

    ExportError: `interpreter` has no llama-cpp-python.
    """
    found = _installed(interpreter)
    file = peer_gguf.q8_0(checkpoint)
    made = []
    for flash in (False, True):
        spec = {"kind": NAME, "path": str(file), "files": [""], "context": context, "flash_attention": flash}
        name = f"{NAME} fa" if flash else NAME
        contender = Contender(
            name=name,
            runtime=NAME,
            peer=True,
            file_bytes=file.stat().st_size,
            model=checkpoint.digest,
            options={
                **found,
                "weights": "Q8_0",
                "kv cache": "fp16",
                "flash attention": "on" if flash else "off",
            },
        )
        command = (str(interpreter), "-P", "-c", _WORKER, str(Path(mobile_export.__file__).parent))
        made.append(Entry(contender, launch=Launch(name, command, spec)))
    return made


def _installed(interpreter: Path) -> dict[str, str]:
    done = subprocess.run([str(interpreter), "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        raise ExportError(f"'{interpreter.name}' has no llama-cpp-python", _INSTALL)
    version, system = done.stdout.splitlines()[-2:]
    note = interpreter.parent.parent / "build.json"
    build = json.loads(note.read_text("utf-8")) if note.is_file() else {}
    return {"llama-cpp-python": version, "features": system, **build}
