"""The command as a user meets it, each time in a process of its own."""

import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mobile_export.bundle import load, verify
from mobile_export.checkpoint import resolve

HEAVY = ("torch", "transformers", "executorch", "numpy", "optimum", "tokenizers", "huggingface_hub", "gguf")
STEP = re.compile(r"([a-z :]+  (failed after )?\d+\.\d s.*|reading .*|)")
"""A line of progress, or none: click ends the line of a ^C."""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(done):
    """The one line that says what is wrong; beside it there may be lines of progress only."""
    lines = [line for line in done.stderr.splitlines() if not STEP.fullmatch(line)]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and "; " in lines[0], done.stderr
    assert done.stdout == ""
    return lines[0]


def test_help_is_instant(cli):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        done = cli("--help")
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0 and done.stderr == ""
    assert statistics.median(times) < 0.5, "0.1 s on an idle machine"
    names = "android ios onnx all lint golden parity blame run inspect doctor"
    for name in names.split():
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


def test_the_shell_imports_nothing_heavy(command):
    code = f"import mobile_export.cli, sys; print(sorted(set(sys.modules) & set({HEAVY})))"
    args = command()["env"]
    done = subprocess.run([sys.executable, "-c", code], env=args, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", [(), ("android",), ("all",), ("golden",), ("golden", "record"), ("run",), ("parity",)]
)
def test_each_command_explains_itself(cli, name):
    done = cli(*name, "-h")
    assert done.returncode == 0 and done.stdout.startswith("Usage: ")


def test_version(cli):
    import mobile_export

    assert cli("--version").stdout.strip().endswith(mobile_export.__version__)


WRONG = {
    "unknown model 'qwen2.5-coder-0.5b-instuct'; did you mean 'qwen2.5-coder-0.5b-instruct'?": (
        "android --model qwen2.5-coder-0.5b-instuct"
    ),
    "unsupported architecture|not supported|family": "android --model sandbox:gemma3",
    "unknown recipe 'int9'; did you mean 'int8'?": "android --model SANDBOX --recipe int9",
    "unknown recipe key 'executorch.kv_cach'; did you mean 'kv_cache'?": (
        "android --model SANDBOX --recipe bad.toml"
    ),
    "context 0 is too small": "android --model SANDBOX --context 0",
    "context 4097 is past the model's 4096": "android --model SANDBOX --context 4097",
    "there is no file or folder './none.gguf'": "android --model ./none.gguf",
    "there is no file or folder 'none'": "inspect none",
    "there is no folder 'none'": "parity none",
    "'letters' is not a bundle: it has no manifest.json": "run letters hello",
    "there is no golden 'none'": "golden show none",
}


@pytest.mark.parametrize("says", WRONG)
def test_a_mistake_is_one_line(cli, spec, tmp_path, says):
    (tmp_path / "bad.toml").write_text("[executorch]\nkv_cach = 'int8'\n")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    before = contents(tmp_path)
    words = [spec() if word == "SANDBOX" else word for word in WRONG[says].split()]
    line = refusal(cli(*words, cwd=tmp_path))
    assert re.search(says.replace("?", "[?]"), line), line
    assert str(tmp_path) not in line and str(Path.home()) not in line
    assert contents(tmp_path) == before


def test_a_damaged_model_is_one_line(cli, spec, tmp_path):
    """A truncated and an altered safetensors, a truncated GGUF, a pickle."""
    source = resolve(spec())
    folder = tmp_path / "model"
    shutil.copytree(source.folder, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors" in refusal(cli("android", "--model", "model", cwd=tmp_path))
    weights.write_bytes(whole[:8] + whole[8:40].replace(b"{", b"[") + whole[40:])
    assert "model.safetensors" in refusal(cli("android", "--model", "model", cwd=tmp_path))
    weights.rename(folder / "pytorch_model.bin")
    refusal(cli("android", "--model", "model", cwd=tmp_path))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]))
    assert "cut.gguf" in refusal(cli("android", "--model", "cut.gguf", cwd=tmp_path))
    assert not (tmp_path / "dist").exists()


def test_usage_is_two(cli):
    for words in (("android", "--contxt", "3"), ("android", "--context", "many"), ("runn",), ("run", "x")):
        done = cli(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_inspect_doctor_and_golden_in_json(cli, sandbox_bundle):
    report = json.loads(cli("inspect", sandbox_bundle.folder, "--json").stdout)
    assert json.dumps(report).count("model.pte") >= 1
    (found := json.loads(cli("doctor", "--json").stdout))[0].keys()
    assert {"name", "hint"} <= found[0].keys()
    header = json.loads(cli("golden", "show", "--json").stdout)
    assert header["model"] == "qwen2.5-coder-0.5b-instruct" and header["positions"] >= 2000


def test_run_streams_an_answer(cli, sandbox_bundle):
    from mobile_export.generate import generate

    words = ("run", sandbox_bundle.folder, "hello", "--raw", "--max-tokens", "8", "--threads", "1")
    done = cli(*words, text=False)
    assert done.returncode == 0, done.stderr
    expected = "".join(generate(sandbox_bundle, "hello", raw=True, max_tokens=8))
    assert done.stdout == expected.encode() + b"\n" and expected
    assert done.stderr == b"", "no library talks to the user"


def test_parity_exits_by_its_verdict(cli, sandbox_bundle, tmp_path):
    done = cli("parity", sandbox_bundle.folder, "--quick", "--artifact-only", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(line["stage"], line["passed"]) for line in report["stages"]] == [("artifact", True)]

    before = tmp_path / "before.json"
    before.write_text(done.stdout)
    words = ("parity", sandbox_bundle.folder, "--quick", "--artifact-only", "--baseline", before)
    done = cli(*words)
    assert done.returncode == 0 and "no worse than the baseline in 3 figures" in done.stdout
    report["stages"][0]["metrics"]["kl_mean"] /= 2
    before.write_text(json.dumps(report))
    done = cli(*words, "--json")
    assert done.returncode == 1 and "kl_mean" in done.stderr
    assert json.loads(done.stdout)["stages"][0]["passed"], "within its limit, and yet worse"

    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    table = json.loads((folder / "manifest.json").read_bytes())
    table["recipe"]["table"]["parity"]["total"]["kl_mean"] = 0.0
    (folder / "manifest.json").write_bytes(msgspec.json.encode(table))
    done = cli("parity", folder, "--quick", "--artifact-only")
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout and f"`mobile-export blame {folder}`" in done.stderr

    with (folder / "model.pte").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    assert "'model.pte' was altered" in refusal(cli("parity", folder, "--quick"))


@pytest.fixture
def export_of(spec, exported):
    """The arguments of an export whose passes and golden are in the cache already."""
    return lambda out: ("android", "--model", spec(), "--context", "64", "--no-measure", "--out", out)


@contextmanager
def lowering(command, arguments):
    """A running export that is past its passes and writes the artefact."""
    process = subprocess.Popen(
        **command(*arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.startswith("quantize"):
                break
        time.sleep(0.7)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_ctrl_c_in_the_middle(command, export_of, tmp_path):
    with lowering(command, export_of(tmp_path / "android")) as process:
        assert [path.name for path in tmp_path.iterdir()] == [f".android.{process.pid}.tmp"]
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().splitlines()
        assert process.wait(timeout=60) == 130
    lines = [line for line in said if not STEP.fullmatch(line)]
    assert lines == ["error: interrupted; nothing half written was kept"]
    assert list(tmp_path.iterdir()) == []


def test_kill_9_in_the_middle_and_the_export_after_it(command, cli, export_of, exported, tmp_path):
    out = tmp_path / "android"
    with lowering(command, export_of(out)) as process:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not out.exists()
    done = cli(*export_of(out), "--json")
    assert done.returncode == 0, done.stderr
    assert all(one["cached"] for one in json.loads(done.stdout)["passes"]), "traced once"
    verify(load(out))
    assert contents(out) == contents(Path(exported.folder)), "another process, the same bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["android"], "nothing of the killed one is left"


@contextmanager
def small_disk(path):
    """A disk of 128 kB at `path`; where it cannot be mounted, a limit on the size of a file."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(path)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        limit = (128 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        yield None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(cli, export_of, tmp_path):
    with small_disk(tmp_path / "disk") as before:
        done = cli(*export_of(tmp_path / "disk" / "android"), preexec_fn=before)
        line = refusal(done)
        assert re.search(r"cannot write the bundle: (No space left on device|File too large); free", line)
        assert list((tmp_path / "disk").iterdir()) == []
