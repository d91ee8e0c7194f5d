"""What tests share: a small model and its bundle, the real bundle, the command in a process of its own."""

import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import platformdirs
import pytest

import mobile_export

CACHE = "MOBILE_EXPORT_CACHE"
USERS_CACHE = os.environ.get(CACHE)
SANDBOX = "sandbox:{}?layers=2&hidden=64&vocab=1024"
"""Its head's codes are as large as what a `.pte` stores once: see pte_share.SMALLEST."""
CONTEXT = 64


def pytest_sessionstart(session):
    """Unit tests never touch the user's cache or phone, and start no adb server that would stay."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore Ctrl-C
    session.config.cache_of_tests = tempfile.mkdtemp(prefix="mobile-export-tests-")
    os.environ[CACHE] = session.config.cache_of_tests
    os.environ["ADB_SERVER_SOCKET"] = "none:"


def pytest_sessionfinish(session):
    shutil.rmtree(session.config.cache_of_tests, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Real tests do use it: the models there took minutes to fetch. Fixtures of all scopes see it too."""
    if item.get_closest_marker("real") is None:
        return (yield)
    before = os.environ.pop(CACHE)
    if USERS_CACHE is not None:
        os.environ[CACHE] = USERS_CACHE
    try:
        return (yield)
    finally:
        os.environ[CACHE] = before


@pytest.fixture(scope="session")
def users_cache():
    """The user's own cache, for what is fetched there once and is no model."""
    return Path(USERS_CACHE) if USERS_CACHE else platformdirs.user_cache_path("mobile-export")


@pytest.fixture(scope="session")
def spec():
    """The small model's name, by family."""
    return lambda family="qwen2", more="": SANDBOX.format(family) + more


@pytest.fixture(scope="session")
def programs_of():
    """(checkpoint, traced, quantized) of a model's name, made once: tests that alter one copy it."""
    from mobile_export import passes
    from mobile_export.checkpoint import resolve
    from mobile_export.recipe import load_recipe

    @cache
    def run(name, context=CONTEXT):
        checkpoint, recipe = resolve(name), load_recipe("sandbox", context=context)
        quantized = passes.run(checkpoint, recipe).program
        return checkpoint, passes.run(checkpoint, recipe, last="trace").program, quantized

    return run


@pytest.fixture(scope="session")
def exported(spec, tmp_path_factory):
    """The small model's export, one a session. Tests that alter it copy it first."""
    from mobile_export.export import export

    out = tmp_path_factory.mktemp("exported") / "android"
    return export("android", model=spec(), context=CONTEXT, out=out, measure=False)


@pytest.fixture(scope="session")
def sandbox_bundle(exported):
    """The small model's bundle, opened."""
    from mobile_export.bundle import load

    return load(Path(exported.folder))


@pytest.fixture(scope="session")
def real_bundles(tmp_path_factory):
    """The default model's bundle of a platform, exported once a session: trace and quantize once for all.

    MOBILE_EXPORT_REAL names a folder that has them already, e.g. dist/qwen2.5-coder-0.5b-instruct.
    """
    from mobile_export.bundle import load, verify
    from mobile_export.export import export

    given = os.environ.get("MOBILE_EXPORT_REAL")
    base = Path(given) if given else tmp_path_factory.mktemp("real")

    @cache
    def made(platform):
        if not given:
            export(platform, out=base / platform, measure=False)
        bundle = load(base / platform)
        verify(bundle)
        return bundle

    return made


@pytest.fixture(scope="session")
def real_bundle(real_bundles):
    """The default model's ExecuTorch bundle."""
    return real_bundles("android")


@pytest.fixture(scope="session")
def command():
    """Arguments and environment of `python -m mobile_export ...` from any folder, as a user runs it."""
    paths = [str(Path(mobile_export.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]

    def build(*arguments, **env):
        path = os.pathsep.join(filter(None, paths))
        return {
            "args": [sys.executable, "-m", "mobile_export", *map(str, arguments)],
            "env": {**os.environ, "PYTHONPATH": path, **env},
        }

    return build


@pytest.fixture(scope="session")
def cli(command):
    """Run the command to its end."""

    def run(*arguments, env=None, **more):
        kept = {"capture_output": True, "text": True, "timeout": 600, **more}
        return subprocess.run(**command(*arguments, **(env or {})), **kept)

    return run


@pytest.fixture(scope="session")
def missing_codes():
    """Of code matrices int8 [N, K] by name, those that a `.pte` holds neither whole nor in `parts`.

    A recipe's `executorch.mlp_parts` cuts the MLPs' matrices into as many equal parts of rows or columns.
    """
    import numpy as np

    from mobile_export.flatbuffer import Table
    from mobile_export.pte_share import HEADER

    def blobs(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            base, program = HEADER.unpack_from(data, 8)[3], Table.root(data)
            spans = [(base + table.number(0, "Q"), table.number(1, "Q")) for table in program.tables(4)]
            for table in program.tables(7):
                at, size = spans[table.number(1, "I")]
                yield data[at : at + size]

    def check(path, codes, parts=1):
        found = {hashlib.sha256(blob).hexdigest() for blob in blobs(path)}
        cuts = [(1, 0), (parts, 0), (parts, 1)]

        def held(one, count, axis):
            if one.shape[axis] % count:
                return False
            pieces = np.split(one, count, axis)
            return all(hashlib.sha256(np.ascontiguousarray(piece)).hexdigest() in found for piece in pieces)

        return [name for name, one in codes.items() if not any(held(one, *cut) for cut in cuts)]

    return check


@pytest.fixture(scope="session")
def writes_right_code():
    """Have a bundle's artefact write a function, and run that."""
    from mobile_export.generate import generate

    def check(bundle, **options):
        ask = "Write a Python function reverse_string(s) that returns the string s reversed. Only the code."
        answer = "".join(generate(bundle, ask, threads=2, **options))
        blocks = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
        assert blocks, answer
        test = "\nassert reverse_string('abc') == 'cba'\nassert reverse_string('') == ''\nprint('right')\n"
        command = [sys.executable, "-I", "-c", blocks[0] + test]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.stdout.endswith("right\n"), (answer, done.stderr)

    return check


STOCK = """
import json, sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

model, tokenizer, prompt, count, out = sys.argv[1:]
pieces = []
config = GenerationConfig(echo=False, max_new_tokens=int(count), temperature=0.0)
TextLLMRunner(model, tokenizer).generate(prompt, config, pieces.append)
open(out, "w", encoding="utf-8").write(json.dumps(pieces))
"""


@pytest.fixture
def stock_runner(tmp_path):
    """Pieces of text from ExecuTorch's own LLM runner, greedy, on a bundle's files."""

    def run(bundle, prompt, count):
        files = [str(bundle.path(role)) for role in ("program", "tokenizer-runner")]
        out = tmp_path / "pieces.json"
        command = [sys.executable, "-c", STOCK, *files, prompt, str(count), str(out)]
        done = subprocess.run(command, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return json.loads(out.read_text("utf-8"))

    return run
