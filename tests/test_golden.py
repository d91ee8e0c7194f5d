"""Goldens: recorded from the source model, saved, loaded, refused when they are not what they were."""

import json
import os
import subprocess
import sys
from collections import Counter

import msgspec
import numpy as np
import pytest

from mobile_export import golden
from mobile_export.cases import Observation
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.observe import observe
from mobile_export.parity import compare, greedy_matches
from mobile_export.prompts import Prompts, load_prompts
from mobile_export.targets.source import HFRunner

SANDBOX = "sandbox:qwen2?layers=2&hidden=64&vocab=512"
DEFAULT = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(scope="module")
def checkpoint():
    return resolve(SANDBOX)


@pytest.fixture(scope="module")
def prompts():
    whole = load_prompts()
    return Prompts(tuple(item for item in whole.items if item.short or item.kind == "emoji"), whole.sha256)


@pytest.fixture(scope="module")
def recorded(checkpoint, prompts):
    return golden.record(checkpoint, prompts)


@pytest.fixture
def saved(recorded, checkpoint, tmp_path):
    golden.save(recorded, tmp_path / checkpoint.name)
    return tmp_path / checkpoint.name


def test_record_is_what_the_model_says(recorded, checkpoint):
    model = checkpoint.model()
    runner = HFRunner(model)
    again = observe(runner, recorded.cases, {"golden": recorded.observation})
    metrics = compare(recorded.cases, recorded.observation, again, "golden")
    assert metrics.kl_max < 1e-9 and metrics.top1 == 1
    assert metrics.positions == recorded.header.positions == len(recorded.observation.logsumexp)
    assert metrics.greedy_whole == len(recorded.cases)


def test_greedy_is_what_generate_gives_when_nothing_ends_it(recorded, checkpoint):
    import torch

    model = checkpoint.model()
    assert {len(case.greedy) for case in recorded.cases} == {32}
    for case in recorded.cases[:3]:
        out = model.generate(
            torch.tensor([case.tokens]),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            eos_token_id=-1,
        )
        assert out[0, len(case.tokens) :].tolist() == list(case.greedy)


def test_round_trip_keeps_every_bit(recorded, saved):
    loaded = golden.load(saved)
    assert loaded.header == recorded.header
    for name in ("top_ids", "top_logits", "logsumexp", "next_logprob"):
        old, new = getattr(recorded.observation, name), getattr(loaded.observation, name)
        assert old.dtype == new.dtype and np.array_equal(old, new)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    golden.save(loaded, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert sorted(before) == ["golden.json", "golden.safetensors"]


def test_json_is_fit_for_a_diff(saved, recorded):
    text = (saved / "golden.json").read_text("utf-8")
    assert "请用一句话" in text  # readable, not escaped
    lines = text.splitlines()
    assert len(lines) < 12 * len(recorded.cases) + 30
    assert sum(line.lstrip().startswith('"greedy": [') for line in lines) == len(recorded.cases)
    assert msgspec.json.decode(text, type=golden.Header) == recorded.header


def test_text_that_looks_like_a_list_survives(recorded):
    odd = msgspec.structs.replace(recorded.cases[0], text="[\n 1, 2\n] [ 3,  4 ]")
    header = msgspec.structs.replace(recorded.header, cases=(odd,))
    assert msgspec.json.decode(golden._json_bytes(header), type=golden.Header).cases[0].text == odd.text


def flip_byte(folder):
    path = folder / "golden.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut_tensors(folder):
    path = folder / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def cut_json(folder):
    path = folder / "golden.json"
    path.write_text(path.read_text("utf-8")[:-40], "utf-8")


def edit(key, value):
    def change(folder):
        path = folder / "golden.json"
        table = json.loads(path.read_text("utf-8"))
        table[key] = value
        path.write_text(json.dumps(table), "utf-8")

    return change


def drop_token(folder):
    path = folder / "golden.json"
    table = json.loads(path.read_text("utf-8"))
    table["cases"][0]["tokens"].pop()
    path.write_text(json.dumps(table), "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "altered or cut short"),
        (cut_tensors, "altered or cut short"),
        (lambda folder: (folder / "golden.safetensors").unlink(), "has lost its golden.safetensors"),
        (lambda folder: (folder / "golden.json").unlink(), "there is no golden"),
        (cut_json, "golden 'sandbox"),
        (lambda folder: (folder / "golden.json").write_bytes(b"\xff\xfe"), "golden 'sandbox"),
        (lambda folder: (folder / "golden.json").write_text("[]"), "golden 'sandbox"),
        (edit("schema", 2), "has schema 2, not 1"),
        (edit("surprise", 1), "surprise"),
        (edit("vocab", 100), "outside the vocabulary"),
        (edit("positions", 7), "does not hold"),
        (drop_token, "does not hold"),
    ],
)
def test_what_was_altered_is_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(ExportError, match=message) as caught:
        golden.load(saved)
    assert "mobile-export golden record" in caught.value.hint
    assert str(saved.parent) not in str(caught.value)


def test_find_holds_the_golden_to_its_model_and_prompts(saved, checkpoint, prompts):
    import dataclasses

    assert golden.find(checkpoint, prompts, saved.parent).header.model == checkpoint.name
    other = dataclasses.replace(checkpoint, digest="0" * 64)
    with pytest.raises(ExportError, match="another checkpoint"):
        golden.find(other, prompts, saved.parent)
    with pytest.raises(ExportError, match="other prompts"):
        golden.find(checkpoint, Prompts(prompts.items, "0" * 64), saved.parent)
    with pytest.raises(ExportError, match="there is no golden 'nobody'"):
        golden.find(dataclasses.replace(checkpoint, name="nobody"), prompts, saved.parent)


def test_subset_keeps_rows_with_their_cases(recorded, checkpoint):
    few = recorded.subset(short=True, context=20)
    assert [case.name for case in few.cases] == [case.name for case in recorded.cases if case.short]
    assert max(len(case.inputs) for case in few.cases) == 20
    assert few.header.positions == len(few.observation.top_ids) == sum(len(case.inputs) for case in few.cases)
    seen = observe(HFRunner(checkpoint.model()), few.cases, {"golden": few.observation})
    assert compare(few.cases, few.observation, seen, "golden").kl_max < 1e-9
    whole = recorded.subset()
    assert np.array_equal(whole.observation.top_ids, recorded.observation.top_ids)


def test_selftest_is_small_and_is_about_the_stage_observed(recorded):
    table = golden.selftest(recorded.cases, recorded.observation)
    encoded = msgspec.json.encode(table)
    assert len(encoded) < 20_000
    assert [entry["name"] for entry in table["cases"]] == [case.name for case in recorded.cases if case.short]
    for entry, case in zip(table["cases"], (case for case in recorded.cases if case.short), strict=True):
        assert entry["top_ids"][0] == case.greedy[0]
        assert (len(entry["top_ids"]), len(entry["top_logits"]), entry["greedy_match"]) == (8, 8, 32)
    worse = recorded.observation.top_ids.copy()
    worse[:, 0] = 0
    other = Observation(worse, *(getattr(recorded.observation, name) for name in golden._ARRAYS[1:]))
    assert {entry["greedy_match"] for entry in golden.selftest(recorded.cases, other)["cases"]} == {0}


RECORD = f"""
import hashlib, sys
from mobile_export import golden
golden.pin_arithmetic()
from mobile_export.checkpoint import resolve
from mobile_export.prompts import Prompts, load_prompts
import torch
torch.set_num_threads(int(sys.argv[1]))
prompts = load_prompts()
made = golden.record(resolve("{SANDBOX}"), Prompts(prompts.items[:6], prompts.sha256))
assert torch.get_num_threads() == int(sys.argv[1])
print(hashlib.sha256(golden._json_bytes(made.header)).hexdigest(), made.header.arithmetic)
"""


def test_pinned_recordings_are_equal_to_the_bit():
    runs = [
        subprocess.run(
            [sys.executable, "-c", RECORD, threads],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        ).stdout
        for threads in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].rstrip().endswith("2 threads, pinned")


def test_committed_golden_is_whole_and_large_enough():
    made = golden.load(golden.golden_folder() / DEFAULT)
    prompts = load_prompts()
    assert made.header.prompts_sha256 == prompts.sha256
    assert [case.name for case in made.cases] == [item.name for item in prompts.items]
    assert sum(len(case.tokens) for case in made.cases) >= 2000
    assert greedy_matches(made.cases, made.observation.top_ids[:, 0]) == [32] * len(made.cases)
    assert all(len(case.tokens) >= 250 for case in made.cases if case.kind == "long")
    short = [case for case in made.cases if case.short]
    assert len({case.kind for case in short}) == len(short) == 4
    assert all(len(case.tokens) > 1 for case in short)
    assert len(msgspec.json.encode(golden.selftest(made.cases, made.observation))) < 20_000


@pytest.mark.real
def test_committed_golden_is_of_the_default_model():
    checkpoint = resolve()
    short = golden.find(checkpoint, load_prompts()).subset(short=True)
    seen = observe(HFRunner(checkpoint.model()), short.cases, {"golden": short.observation})
    metrics = compare(short.cases, short.observation, seen, "golden")
    assert metrics.kl_max < 1e-8 and metrics.top1 == 1


def test_prompt_kinds_and_names():
    kinds = Counter(item.kind for item in load_prompts().items)
    assert sum(kinds.values()) >= 26
    assert set(kinds) == {"code", "english", "chinese", "chat", "long", "emoji", "mixed"}
