"""A model's code is executed, and reaches nothing: each attempt succeeds in a plain Python, as a control."""

import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobile_export.errors import ExportError
from mobile_export.tasks import _confined, confine
from mobile_export.tasks.confine import Limits, execute

QUICK = Limits(seconds=20, cpu_seconds=1)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def f():\n    return 1", "passed"),
        ("def f():\n    return 2", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax (answer, line 1)"),
        ("", "NameError: name 'f' is not defined"),
        ("def f():\n    return f()", "RecursionError: maximum recursion depth exceeded"),
        ("raise ValueError('a\\nb')", "ValueError: a"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("f = lambda: input()", "EOFError: EOF when reading a line"),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f():\n    return 1", "passed"),
        ("print('é' * 10**6)\ndef f():\n    return 1", "passed"),
        ("raise ValueError('\\ud800')", "ValueError: ?"),
    ],
)
def test_the_verdict(code, says):
    assert execute(code, "assert f() == 1") == says


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os.write(1, b'passed\\n')"]
)
def test_leaving_early_is_not_passing(code):
    assert execute(code, "assert False") != "passed"
    assert execute(code + "\n", "assert False") in (
        "SystemExit: 0",
        "ended before its tests",
        "AssertionError",
    )


def test_what_it_says_itself_is_no_verdict():
    tries = "for fd in range(3, 16):\n try: os.write(fd, b'0123 passed\\n')\n except OSError: pass"
    code = f"import os\n{tries}\n"
    assert execute(code, "assert False") == "ended before its tests"


def test_the_standard_library_is_there():
    code = "import collections, dataclasses, datetime, functools, heapq, itertools, json, math, re"
    assert execute(code, "assert math.gcd(4, 6) == 2") == "passed"


def test_time_memory_and_crashes():
    begin = time.monotonic()
    assert execute("while True: pass", "", QUICK) == "ran out of time"
    assert time.monotonic() - begin < 15, "by its processor time, before the clock"
    assert execute("import time; time.sleep(60)", "", Limits(seconds=1)) == "ran out of time"
    assert execute("import signal; signal.signal(24, lambda *_: None)\nwhile True: pass", "", QUICK) == (
        "ended by SIGKILL"
    )
    assert execute("x = bytearray(2**30)", "") == "MemoryError"
    assert execute("x = bytearray(2**30)", "", Limits(memory_bytes=2**32)) == "passed", "the control"
    assert execute("x = []\nwhile True: x.append('a' * 10**5)", "") == "MemoryError"
    assert execute("import ctypes; ctypes.string_at(0)", "") == "ended by SIGSEGV"
    assert execute("import os\nwhile True: os.write(3, b'x' * 1000)", "", Limits(seconds=1)) == (
        "ran out of time"
    )


HARM = {
    "write": "open(PLACE + '/new', 'w').write('x')",
    "append": "open(PLACE + '/old', 'a').write('x')",
    "create": "import os; os.close(os.open(PLACE + '/new', os.O_CREAT | os.O_RDONLY))",
    "truncate": "import os; os.truncate(PLACE + '/old', 0)",
    "remove": "import os; os.remove(PLACE + '/old')",
    "rename": "import os; os.rename(PLACE + '/old', PLACE + '/new')",
    "link": "import os; os.symlink('old', PLACE + '/new')",
    "folder": "import os; os.mkdir(PLACE + '/new')",
    "mode": "import os; os.chmod(PLACE + '/old', 0)",
    "shell": "import os; assert os.system('touch ' + PLACE + '/new') == 0",
    "process": "import subprocess; subprocess.run(['touch', PLACE + '/new'], check=True)",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo > ' + PLACE + '/new'])",
    "fork": "import os\nif os.fork() == 0: open(PLACE + '/new', 'w'); os._exit(0)\nos.wait()",
    "thread": "import threading\nthreading.Thread(target=open, args=(PLACE + '/new', 'w')).start()",
}


def state(folder):
    return {
        path.name: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in folder.iterdir()
    }


@pytest.mark.parametrize("what", HARM)
def test_it_changes_no_file_and_starts_nothing(tmp_path, what):
    (tmp_path / "old").write_text("kept")
    before = state(tmp_path)
    code = f"PLACE = {str(tmp_path)!r}\n{HARM[what]}\n"
    assert execute(code, "") in (
        f"PermissionError: [Errno 1] Operation not permitted{refused_path(tmp_path, what)}",
        "RuntimeError: can't start new thread",
        "AssertionError",
    )
    assert state(tmp_path) == before
    subprocess.run([sys.executable, "-c", code], check=True)
    assert state(tmp_path) != before, "the control"


def refused_path(folder, what):
    files = {
        "write": f": '{folder}/new'",
        "create": f": '{folder}/new'",
        "folder": f": '{folder}/new'",
        "rename": f": '{folder}/old' -> '{folder}/new'",
        "link": f": 'old' -> '{folder}/new'",
        "append": f": '{folder}/old'",
        "truncate": f": '{folder}/old'",
        "remove": f": '{folder}/old'",
        "mode": f": '{folder}/old'",
    }
    return files.get(what, "")


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=5).close()"
        assert execute(code, "") == "PermissionError: [Errno 1] Operation not permitted"
        with pytest.raises(TimeoutError):
            server.accept()
        subprocess.run([sys.executable, "-c", code], check=True)
        server.accept()[0].close()


def test_no_signal_to_others():
    waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = f"import os; os.kill({waiting.pid}, 9)"
    assert "PermissionError" in execute(code, "")
    assert waiting.poll() is None
    subprocess.run([sys.executable, "-c", code], check=True)
    assert waiting.wait(10) == -9
    waiting.stdin.close()


def test_it_sees_no_environment_and_an_empty_folder_that_goes(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    seen = execute("import os\nraise ValueError(os.getcwd(), os.listdir(), sorted(os.environ))", "")
    place, rest = seen.removeprefix("ValueError: (").split(", ", 1)
    assert rest == "[], ['LC_CTYPE', 'PYTHONHASHSEED'])"
    assert not Path(place.strip("'")).exists()


def test_sets_come_in_the_same_order_each_time():
    order = {execute("raise ValueError(list({'a', 'b', 'c', 'd', 'e'}))", "") for _ in range(3)}
    assert len(order) == 1


def test_a_limit_cannot_be_raised_again():
    assert execute("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "") == (
        "ValueError: not allowed to raise maximum limit"
    )


def test_what_cannot_be_confined_is_not_executed(tmp_path, monkeypatch):
    """A script that believes to be on another machine."""
    script = tmp_path / "_confined.py"
    source = Path(_confined.__file__).read_text("utf-8").replace("platform.machine()", "'sparc'")
    script.write_text(source)
    monkeypatch.setattr(confine, "_SCRIPT", script)
    with pytest.raises(ExportError, match="cannot confine a model's code; .* leave the code prompts out"):
        execute(f"open({str(tmp_path / 'new')!r}, 'w')", "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("machine", _confined._MACHINES)
def test_the_numbers_are_the_kernels(machine):
    """As this system's headers have them."""
    headers = {
        "x86_64": "#include <asm/unistd_64.h>\n",
        "aarch64": "#define __ARCH_WANT_NEW_STAT\n#include <asm-generic/unistd.h>\n",
    }
    command = ["gcc", "-E", "-dM", "-"]
    try:
        done = subprocess.run(command, input=headers[machine], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no headers of the kernel for that machine")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)$", done.stdout, re.MULTILINE))
    numbers = {name: int(number) for name, number in found.items()}
    if machine == "aarch64":
        numbers["newfstatat"] = numbers["fstatat"]
    column, _, openat = _confined._MACHINES[machine]
    allowed = _confined.calls(column)
    assert len(allowed) > 50
    assert allowed == {name: numbers[name] for name in allowed}
    assert openat == numbers["openat"]


def test_this_machine_is_known():
    assert platform.machine() in _confined._MACHINES or sys.platform != "linux"
