"""Speculative decoding says what the target says alone, and drafting well takes fewer calls."""

import json

import numpy as np
import pytest

from mobile_export.errors import ExportError
from mobile_export.export import export
from mobile_export.latency import drafting
from mobile_export.speculative import greedy, speculate
from mobile_export.targets import onnx, reference

PROMPT = [5, 90, 12, 300, 44]


@pytest.fixture(scope="module")
def large(programs_of, spec):
    return reference.open(programs_of(spec())[1])


@pytest.fixture(scope="module")
def small(programs_of, spec):
    return reference.open(programs_of(spec())[2])


@pytest.fixture(scope="module")
def other(programs_of, spec):
    """Another model with the same vocabulary: it hardly ever guesses right."""
    return reference.open(programs_of(spec("llama"))[2])


class Counted:
    """A runner that counts its calls."""

    def __init__(self, runner):
        self.runner, self.calls = runner, 0

    def last_logits(self, tokens, start):
        self.calls += 1
        return self.runner.last_logits(tokens, start)

    def logits(self, tokens, start):
        self.calls += 1
        return self.runner.logits(tokens, start)


@pytest.mark.parametrize("ahead", [1, 2, 5, 30])
@pytest.mark.parametrize("drafting_with", ["small", "other", "large"])
def test_the_answer_is_the_targets_own(request, large, ahead, drafting_with):
    draft = request.getfixturevalue(drafting_with)
    alone = greedy(large, PROMPT, 30)
    counted = Counted(large)
    found = speculate(counted, draft, PROMPT, 30, ahead)
    assert found.tokens == alone and len(alone) == 30
    assert counted.calls == 1 + found.checks
    assert found.accepted <= found.drafted
    if drafting_with == "large":
        assert found.accepted == found.drafted
        assert found.checks == -(-29 // (ahead + 1))
    if drafting_with == "other":
        assert found.accepted < found.drafted


def test_in_onnx_runtime_with_a_cache_that_is_written_over(programs_of, spec, tmp_path, large):
    from mobile_export.recipe import ONNX

    _, traced, quantized = programs_of(spec())
    for name, program in (("large", traced), ("small", quantized)):
        (tmp_path / name).mkdir()
        onnx.lower(program, ONNX(accuracy_level=0), tmp_path / name / "model.onnx")
    target, draft = (onnx.open(tmp_path / name / "model.onnx") for name in ("large", "small"))
    found = speculate(target, draft, PROMPT, 40, 4)
    assert found.tokens == greedy(target, PROMPT, 40) == greedy(large, PROMPT, 40)
    assert 0 < found.accepted < found.drafted


@pytest.fixture(scope="module")
def bundles(spec, tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    for recipe in ("fp32", "sandbox"):
        export("onnx", model=spec(), recipe=recipe, context=256, out=base / recipe)
    return base / "fp32", base / "sandbox"


def test_bench_measures_a_pair(cli, bundles, tmp_path):
    large, small = bundles
    file = tmp_path / "draft.json"
    words = ("--draft", small, "--rounds", "1", "--threads", "1", "--busy", "--json", file)
    done = cli("bench", large, *words)
    assert done.returncode == 0, done.stderr
    assert "the same tokens as without" in done.stdout
    report = json.loads(file.read_bytes())
    assert len(report["trials"]) == len(drafting.PROMPTS)
    assert (report["target"]["options"]["recipe"], report["draft"]["options"]["recipe"]) == (
        "fp32",
        "sandbox",
    )
    for trial in report["trials"]:
        assert trial["drafted_ns"] > 0 and 0 <= trial["accepted"] <= trial["drafted"]


def test_pairs_that_cannot_be(bundles, sandbox_bundle, cli):
    large, small = bundles
    done = cli("bench", large, "--draft", sandbox_bundle.folder, "--busy")
    assert done.returncode == 2 and "a context of 64 is too short for it" in done.stderr
    done = cli("bench", large, "--draft", small, "--vs", "llama.cpp")
    assert done.returncode == 2 and "--draft measures one bundle on this host; leave out" in done.stderr


def test_an_answer_that_the_drafts_changed_is_no_measurement(monkeypatch, bundles):
    changed = np.random.default_rng(0)

    def wrong(*arguments):
        found = speculate(*arguments)
        found.tokens[int(changed.integers(1, 8))] += 1
        return found

    monkeypatch.setattr(drafting, "speculate", wrong)
    with pytest.raises(ExportError, match="with drafts the target says another token than alone, token"):
        drafting.bench(*bundles, ahead=3, rounds=1, threads=1, busy=True)
