import importlib.util
import os
import sys
from dataclasses import replace

import msgspec
import pytest
import torch

import mobile_export
from mobile_export import checkpoint, passes, programs
from mobile_export.errors import ExportError
from mobile_export.passes import PASSES, runner
from mobile_export.recipe import load_recipe

RECIPE = load_recipe(context=32)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILE_EXPORT_CACHE", str(root))
        yield root


@pytest.fixture(scope="module")
def model(cache):
    return checkpoint.resolve("sandbox:qwen2?layers=1&hidden=32&vocab=300")


def stored(cache):
    return {path.name for path in (cache / "programs").iterdir() if not path.name.startswith(".")}


def bytes_of(cache):
    return {path: path.read_bytes() for path in sorted((cache / "programs").rglob("*.*")) if path.is_file()}


class Rename:
    """A pass that only signs the program, or fails as it is told."""

    reads = ("context",)

    def __init__(self, name, error=None, in_check=False):
        self.name, self.error, self.in_check = name, error, in_check

    def run(self, program, recipe):
        if self.error and not self.in_check:
            raise self.error
        return replace(program, passes=(*program.passes, self.name))

    def check(self, program, recipe):
        if self.error and self.in_check:
            raise self.error


def run_with(model, *extra):
    return runner.run(model, RECIPE, (PASSES[0], *extra))


def how(passed):
    return [(ran.name, ran.cached) for ran in passed.log]


def test_a_second_run_takes_both_programs_from_the_cache(model, cache, capsys):
    first = passes.run(model, RECIPE)
    assert how(first) == [("trace", False), ("rotate", False), ("quantize", False)]
    assert first.program.passes == ("trace", "rotate", "quantize")
    before = bytes_of(cache)
    capsys.readouterr()
    second = passes.run(model, RECIPE)
    assert how(second) == [("trace", True), ("rotate", True), ("quantize", True)]
    assert capsys.readouterr().err.splitlines()[0].endswith("cached")
    assert how(passes.run(model, RECIPE, last="trace")) == [("trace", True)]

    again = passes.run(model, RECIPE, use_cache=False)
    assert how(again) == [("trace", False), ("rotate", False), ("quantize", False)]
    assert bytes_of(cache) == before and len(before) == 9

    caches = first.program.exported.example_inputs[0][2]
    inputs = (torch.arange(5)[None], torch.tensor([0]), caches)
    outputs = [passed.program.exported.module()(*inputs)[0] for passed in (first, second, again)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_only_what_a_pass_reads_makes_it_run_again(model):
    chain = (Rename("a"), Rename("b"))
    keys = runner.keys_of(model, RECIPE, chain)
    lenient = msgspec.structs.replace(RECIPE, parity=msgspec.structs.replace(RECIPE.parity))
    renamed = msgspec.structs.replace(lenient, name="other")
    assert runner.keys_of(model, renamed, chain) == keys
    shorter = msgspec.structs.replace(RECIPE, context=16)
    assert not set(runner.keys_of(model, shorter, chain)) & set(keys)
    assert not set(runner.keys_of(replace(model, digest="0"), RECIPE, chain)) & set(keys)
    assert runner.keys_of(model, RECIPE, (Rename("a"), Rename("c")))[0] == keys[0]
    assert runner.keys_of(model, RECIPE, (Rename("c"), Rename("b")))[1] != keys[1]


def test_a_data_file_of_a_pass_is_in_its_key(model, monkeypatch):
    """And the rounding is."""
    quantize = RECIPE.quantize
    nearest = msgspec.structs.replace(RECIPE, quantize=msgspec.structs.replace(quantize, rounding="nearest"))
    before, other = runner.keys_of(model, RECIPE, PASSES), runner.keys_of(model, nearest, PASSES)
    assert before[:-1] == other[:-1] and before[-1] != other[-1]
    monkeypatch.setattr(PASSES[-1].__class__, "data", ("catalog.toml",))
    after = runner.keys_of(model, RECIPE, PASSES)
    assert before[:-1] == after[:-1] and before[-1] != after[-1]


def test_the_code_of_a_pass_and_of_all_it_imports_is_in_its_key(tmp_path, monkeypatch):
    sources = {
        "one": "class One:\n    def run(self):\n        from mobile_export.two import deep\n",
        "two/__init__": "from mobile_export import three\nimport json\n",
        "three": "import mobile_export.one\n",
        "other": "",
    }
    monkeypatch.setattr(mobile_export, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "two").mkdir()
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location("one", tmp_path / "one.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "one", module)
    spec.loader.exec_module(module)

    def changed(name):
        before = runner.code_version(module.One)
        (tmp_path / f"{name}.py").write_text(sources[name] + "# changed\n")
        return runner.code_version(module.One) != before

    assert [changed(name) for name in sources] == [True, True, True, False]


@pytest.mark.parametrize("in_check", [False, True])
def test_a_failure_names_the_pass_and_those_before_it_and_stores_nothing(model, cache, in_check):
    run_with(model, Rename("sign"))
    before = stored(cache)
    bad = Rename("bad", ExportError("no luck", "try again"), in_check)
    with pytest.raises(ExportError) as caught:
        run_with(model, Rename("sign"), bad)
    assert caught.value.message == "pass 'bad' failed (passed before: trace, sign): no luck"
    assert caught.value.hint == "try again"
    with pytest.raises(ExportError, match=r"pass 'bad' failed .*: shape\[0\] is odd; report"):
        run_with(
            model, Rename("sign"), Rename("bad", RuntimeError("shape[0] is odd\nstack\nof lines"), in_check)
        )
    with pytest.raises(KeyboardInterrupt):
        run_with(model, Rename("sign"), Rename("bad", KeyboardInterrupt(), in_check))
    assert stored(cache) == before


def test_a_damaged_program_is_made_again(model, cache):
    passes.run(model, RECIPE)
    for path in (cache / "programs").rglob(programs.GRAPH):
        path.write_bytes(path.read_bytes()[:-9])
    assert how(passes.run(model, RECIPE)) == [("trace", False), ("rotate", False), ("quantize", False)]
    assert how(passes.run(model, RECIPE)) == [("trace", True), ("rotate", True), ("quantize", True)]


def test_the_cache_keeps_the_programs_used_last(model, cache, monkeypatch):
    passes.run(model, RECIPE)
    monkeypatch.setattr(runner, "KEPT", 2)
    os.utime(next(iter((cache / "programs").iterdir())), (0, 0))
    run_with(model, Rename("last"))
    assert len(stored(cache)) == 2
    assert how(run_with(model, Rename("last")))[-1] == ("last", True)


def test_a_disk_that_refuses_is_one_line_and_nothing_is_kept(model, cache):
    import resource

    run_with(model)
    before = stored(cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # graph.json is larger
    try:
        with pytest.raises(ExportError, match=r"cannot write the cache .*: File too large; free some space"):
            run_with(model, Rename("never"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored(cache) == before
    assert not [path for path in (cache / "programs").iterdir() if path.name.startswith(".")]
