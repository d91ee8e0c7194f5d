"""One export, whole: what a bundle holds, that it comes out the same, and that a bad one is not written."""

import hashlib
import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from mobile_export import bundle, manifest, schemas
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.export import export
from mobile_export.mlpackage import open_package
from mobile_export.recipe import load_recipe
from mobile_export.targets import executorch
from mobile_export.targets.onnx_weights import codes_of


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bundle_is_whole_and_says_what_it_is(exported, sandbox_bundle, spec):
    bundle.verify(sandbox_bundle)
    made, model = sandbox_bundle.manifest, resolve(spec())
    schema = json.loads((schemas.FOLDER / "manifest.schema.json").read_bytes())
    jsonschema.validate(json.loads(manifest.encode(made)), schema)
    assert exported.manifest == made
    assert (made.platform, made.target) == ("android", "executorch")
    assert (made.model.spec, made.model.digest, made.model.license) == (spec(), model.digest, "CC0-1.0")
    recipe = load_recipe("sandbox", context=64)
    assert (made.recipe.name, made.recipe.digest) == ("sandbox", recipe.digest)
    assert made.tools.keys() >= {"mobile-export", "torch", "transformers", "executorch", "torchao"}
    assert {file.role for file in made.files.values()} == set(manifest.Role.__args__) - {"runtime-config"}
    assert (made.io.context, made.io.vocab, made.io.kv_cache) == (64, 1024, "fp32")
    assert made.io.constant_methods["get_eos_ids"] == made.io.eos_ids == [1023, 1021]
    assert [method.name for method in made.io.methods] == ["forward", "forward_all"]
    assert made.runtime.backends == ["XnnpackBackend"]
    assert "CC0-1.0" in sandbox_bundle.path("notice").read_text("utf-8")
    for role, name in (("tokenizer", "tokenizer.json"), ("tokenizer-config", "tokenizer_config.json")):
        assert sandbox_bundle.path(role).read_bytes() == (model.folder / name).read_bytes()


def test_its_quality_was_measured(sandbox_bundle):
    ((stage, metrics),) = sandbox_bundle.manifest.quality.items()
    assert stage == "source -> artifact, short prompts"
    assert 1e-5 < metrics["kl_mean"] <= 0.03
    assert 0.7 <= metrics["top1"] <= 1
    assert metrics["broken"] == 0 and metrics["positions"] > 100 and metrics["cases"] == 4


def test_the_selftest_is_what_the_artefact_says(sandbox_bundle):
    cases = json.loads(sandbox_bundle.path("selftest").read_bytes())["cases"]
    assert len(cases) == 4
    runner = executorch.open(sandbox_bundle.path("program"))
    for case in cases:
        said = runner.last_logits(case["tokens"], 0)
        assert np.abs(said[case["top_ids"]] - case["top_logits"]).max() < 1e-3
        assert said.argmax() == case["top_ids"][0]


def test_no_path_of_this_machine_is_in_it(sandbox_bundle, tmp_path):
    from mobile_export.checkpoint import cache

    told = [str(Path.home()), str(Path.cwd()), str(cache.root()), str(tmp_path.parent)]
    for name, data in contents(sandbox_bundle.folder).items():
        for path in told:
            assert len(path) > 3 and path.encode() not in data, name


def test_a_fresh_process_and_cache_give_the_same_bytes(exported, spec, cli, tmp_path):
    arguments = ("--model", spec(), "--context", "64", "--no-measure", "--json", "--out", "here/android")
    fresh = {"MOBILE_EXPORT_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "11"}
    done = cli("android", *arguments, env=fresh, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(one["name"], one["cached"]) for one in said["passes"]] == [
        (name, False) for name in ("trace", "rotate", "quantize")
    ]
    assert said["seconds"].keys() == {"lower", "parity"} and said["speed"] == []
    assert contents(tmp_path / "here/android") == contents(Path(exported.folder))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["android"]


def refusing(tmp_path, limits):
    recipe = tmp_path / "strict.toml"
    recipe.write_text("context = 64\n[parity]\ntraced = { kl_mean = 1.0, top1 = 0.0 }\n" + limits)
    return str(recipe)


def test_an_artefact_past_the_limit_is_not_written(exported, spec, tmp_path):
    recipe = refusing(tmp_path, "total = { kl_mean = 0.0, top1 = 0.0 }")
    out = tmp_path / "out" / "android"
    with pytest.raises(ExportError, match=r"does not say what the model says: KL 0\.\d+, .*nothing was wr"):
        export("android", model=spec(), recipe=recipe, out=out, measure=False)
    assert list(out.parent.iterdir()) == []


def test_one_that_contradicts_itself_neither_and_an_earlier_bundle_stays(exported, spec, tmp_path):
    """Cut differently, int8 activations round differently; with no room for that the export refuses."""
    recipe = refusing(
        tmp_path, "total = { kl_mean = 1.0, top1 = 0.0 }\ncut = { kl_max = -1.0, margin = 9.0 }"
    )
    out = tmp_path / "out" / "android"
    shutil.copytree(exported.folder, out)
    with pytest.raises(ExportError, match=r"answers differently when its input is cut differently \(in ch"):
        export("android", model=spec(), recipe=recipe, out=out, measure=False)
    assert contents(out) == contents(Path(exported.folder))
    assert [path.name for path in out.parent.iterdir()] == ["android"]


WRONG = {
    "context 0 is too small": {"context": 0},
    "context -3 is too small": {"context": -3},
    "context 4097 is past the model's 4096; use --context 4096 or less": {"context": 4097},
    "unknown recipe 'sandbax'; did you mean 'sandbox'": {"recipe": "sandbax"},
    "a revision is for hub models only": {"revision": "main"},
}


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_request_is_refused_before_any_work(spec, tmp_path, monkeypatch, says):
    monkeypatch.setattr("mobile_export.passes.run", None)  # work would be an error of another type
    with pytest.raises(ExportError, match=says):
        export("android", model=spec(), out=tmp_path / "out", **WRONG[says])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("platform", ["android", "ios"])
def test_a_target_of_int8_refuses_other_weights(spec, tmp_path, platform, weights):
    says = f"bundles take int8 weights, and recipe '{weights}' asks for {weights}; export it"
    with pytest.raises(ExportError, match=says):
        export(platform, model=spec(), recipe=weights, context=64, out=tmp_path / "out", measure=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_platform_is_refused(spec):
    with pytest.raises(ExportError, match="unknown platform 'androyd'; did you mean 'android'"):
        export("androyd", model=spec())


def test_a_folder_that_is_not_a_bundle_stays(spec, tmp_path):
    mine = tmp_path / "android" / "letter.txt"
    mine.parent.mkdir()
    mine.write_text("dear")
    with pytest.raises(ExportError, match="'android' exists and is not a bundle; choose another --out"):
        export("android", model=spec(), context=64, out=mine.parent, measure=False)
    assert contents(tmp_path) == {"android/letter.txt": b"dear"}


def test_all_platforms_carry_the_same_codes(exported, spec, cli, missing_codes, tmp_path):
    done = cli("all", "--model", spec(), "--context", "64", "--json", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["seconds"] > 0 and said["peak_bytes"] > 1e6
    assert [one["folder"] for one in said["bundles"]] == ["here/android", "here/ios", "here/onnx"]
    assert contents(tmp_path / "here/android") == contents(Path(exported.folder))

    android, ios, onnx = (bundle.load(tmp_path / "here" / name) for name in ("android", "ios", "onnx"))
    core = {sha256(one.data) for one in open_package(ios.path("program")).codes().values()}
    ort = codes_of(onnx.path("program"))
    assert len(ort) == 2 * 7 + 1
    assert {sha256(codes) for codes in ort.values()} == core
    assert not missing_codes(android.path("program"), ort)


def sha256(codes):
    return hashlib.sha256(np.ascontiguousarray(codes)).hexdigest()
