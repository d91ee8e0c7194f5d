"""Parity by stage: all stages pass on a sound bundle, and a broken one is blamed, alone."""

import copy
import shutil
from dataclasses import replace

import msgspec
import pytest

from mobile_export import passes, programs
from mobile_export.bundle import Bundle
from mobile_export.checkpoint import cache, resolve
from mobile_export.errors import ExportError
from mobile_export.passes import runner
from mobile_export.recipe import ExecuTorch
from mobile_export.stages import STAGES, Inputs, inputs, parity
from mobile_export.targets import executorch


@pytest.fixture(scope="module")
def given(sandbox_bundle):
    return inputs(sandbox_bundle, short=True)


@pytest.fixture(scope="module")
def report(given):
    return parity(given)


def verdicts(report):
    return {f"{line.against} -> {line.stage}": line.passed for line in report.stages}


def consistent(report):
    return {group.stage: group.passed for group in report.consistency}


def test_every_stage_of_a_sound_bundle_passes(report, given):
    assert report.passed
    assert list(verdicts(report)) == [
        "golden -> source",
        "source -> traced",
        "traced -> quantized",
        "quantized -> artifact",
        "golden -> artifact",
    ]
    assert consistent(report) == dict.fromkeys(("source", "traced", "quantized", "artifact"), True)
    assert report.checkpoint == given.checkpoint.digest
    kl = {line.stage: line.metrics.kl_mean for line in report.stages}
    assert kl["source"] < 1e-9 and kl["traced"] < 1e-6 < kl["quantized"] and kl["artifact"] > 1e-5
    limits = given.recipe.parity
    held = [line.threshold for line in report.stages]
    assert held == [limits.traced, limits.traced, limits.quantized, limits.artifact, limits.total]


def test_the_artefacts_figures_are_those_of_the_manifest(report, sandbox_bundle):
    (told,) = sandbox_bundle.manifest.quality.values()
    measured = report.stages[-1].metrics
    assert told["kl_mean"] == pytest.approx(measured.kl_mean, rel=1e-3)
    assert (told["top1"], told["positions"]) == (pytest.approx(measured.top1, abs=1e-3), measured.positions)


def test_the_artefact_alone_is_held_to_the_limit_against_the_source(given):
    report = parity(given, ("artifact",))
    assert verdicts(report) == {"golden -> artifact": True}
    assert [line.threshold for line in report.stages] == [given.recipe.parity.total]
    assert report.passed


def test_an_artefact_of_other_weights_is_blamed_alone(given, programs_of, spec, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(given.bundle.folder, folder)
    other = programs_of(spec(more="&seed=1"))[2]
    executorch.lower(other, ExecuTorch(), {}, folder / "model.pte")
    wrong = replace(given, bundle=Bundle(folder, given.bundle.manifest))
    report = parity(wrong, ("quantized", "artifact"))
    assert not report.passed
    assert verdicts(report) == {
        "golden -> quantized": True,
        "quantized -> artifact": False,
        "golden -> artifact": False,
    }
    assert all(consistent(report).values()), "it agrees with itself, whatever it says"


def test_a_wrong_scale_is_blamed_on_quantize(given, tmp_path, monkeypatch):
    """The program in the cache gets one other scale; the artefact, made before, is still right."""
    root = tmp_path / "cache"
    shutil.copytree(cache.root(), root)
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(root))
    checkpoint = resolve(given.checkpoint.spec)
    program = passes.run(checkpoint, given.recipe).program
    exported = copy.copy(program.exported)
    name = next(name for name in exported.state_dict if name.endswith("0_mlp_down_proj_scales"))
    exported._state_dict = {**exported.state_dict, name: exported.state_dict[name] * 3}
    folder = runner._folder(runner.keys_of(checkpoint, given.recipe, passes.PASSES)[-1])
    shutil.rmtree(folder)
    folder.mkdir()
    programs.save(replace(program, exported=exported), folder, runner._source_weights(checkpoint))

    altered = Inputs(given.bundle, given.recipe, checkpoint, given.golden)
    assert verdicts(parity(altered, STAGES[1:])) == {
        "golden -> traced": True,
        "traced -> quantized": False,
        "quantized -> artifact": False,
        "golden -> artifact": True,
    }


def test_a_bundle_of_another_model_needs_that_model(sandbox_bundle, spec):
    with pytest.raises(ExportError, match="is not the model this bundle was made of; name that model with"):
        inputs(sandbox_bundle, model=spec(more="&seed=1"), short=True)


def test_the_whole_golden_must_have_been_recorded(sandbox_bundle):
    with pytest.raises(ExportError, match="there is no golden 'sandbox-.*'; run `mobile-export golden rec"):
        inputs(sandbox_bundle)


def test_the_recipe_of_the_bundle_is_the_one_that_holds(sandbox_bundle):
    table = {**sandbox_bundle.manifest.recipe.table}
    table["parity"] = {**table["parity"], "total": {"kl_mean": 0.0, "top1": 1.0}}
    used = msgspec.structs.replace(sandbox_bundle.manifest.recipe, table=table)
    strict = replace(sandbox_bundle, manifest=msgspec.structs.replace(sandbox_bundle.manifest, recipe=used))
    report = parity(inputs(strict, short=True), ("artifact",))
    assert not report.passed and verdicts(report) == {"golden -> artifact": False}
