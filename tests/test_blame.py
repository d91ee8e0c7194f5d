"""Blame: one wrong scale in any form of the model is found where it is; a sound one blames nobody."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import mobile_export
from mobile_export import passes, programs
from mobile_export.blame import BlameReport, table, verdict
from mobile_export.bundle import Bundle, load
from mobile_export.checkpoint import cache, resolve
from mobile_export.export import export
from mobile_export.passes import runner
from mobile_export.recipe import parse_recipe
from mobile_export.rewrite import rotary_tables
from mobile_export.stages import Inputs, inputs
from mobile_export.taps.blame import blame

TARGETS = {"android": np.float32, "ios": np.float16, "onnx": np.float32}
"""What each platform's artefact keeps scales in."""
PLACES = [
    (0, "self_attn.k_proj", 5),
    (1, "mlp.up_proj", 190),
    (1, "mlp.down_proj", 17),
    (None, "lm_head", 700),
]
"""Layer, kind, column: the scale to break."""


@pytest.fixture(scope="module")
def bundle_of(sandbox_bundle, tmp_path_factory):
    """The small model's bundle, by platform."""
    made = {"android": sandbox_bundle}

    def get(platform):
        if platform not in made:
            out = tmp_path_factory.mktemp("blame") / platform
            spec, context = sandbox_bundle.manifest.model.spec, sandbox_bundle.manifest.io.context
            export(platform, model=spec, context=context, out=out, measure=False)
            made[platform] = load(out)
        return made[platform]

    return get


@pytest.fixture(scope="module")
def program(sandbox_bundle):
    given = inputs(sandbox_bundle, short=True)
    return passes.run(given.checkpoint, given.recipe).program


@pytest.fixture(scope="module")
def in_parts(sandbox_bundle, tmp_path_factory):
    """The small model's ExecuTorch bundle with each MLP in two parts, and its program."""
    folder = tmp_path_factory.mktemp("parts")
    text = Path(mobile_export.__file__).with_name("recipes").joinpath("sandbox.toml").read_text()
    recipe = folder / "parts.toml"
    recipe.write_text(text.replace("[executorch]", "[executorch]\nmlp_parts = 2"))
    spec, context = sandbox_bundle.manifest.model.spec, sandbox_bundle.manifest.io.context
    export("android", model=spec, context=context, recipe=str(recipe), out=folder / "android", measure=False)
    bundle = load(folder / "android")
    given = inputs(bundle, short=True)
    return bundle, passes.run(given.checkpoint, given.recipe).program


def scales_of(program, layer, kind):
    """fp32 [N] of a product."""
    part = "head" if kind == "lm_head" else f"layers_{layer}_{kind.replace('.', '_')}"
    state = program.exported.state_dict
    (name,) = (name for name in state if name.endswith(f"{part}_scales"))
    return state[name].detach().numpy()


def altered_copy(bundle, folder, pairs):
    """A copy of a bundle in whose artefact exactly one of the pairs' arrays is found, and replaced."""
    shutil.copytree(bundle.folder, folder)
    changed = 0
    for path in folder.rglob("*"):
        if path.suffix in (".bin", ".data", ".pte"):
            data = path.read_bytes()
            for right, wrong in pairs:
                changed += right.tobytes() in data
                data = data.replace(right.tobytes(), wrong.tobytes())
            path.write_bytes(data)
    assert changed == 1
    return Bundle(folder, bundle.manifest)


@pytest.mark.parametrize("platform", TARGETS)
@pytest.mark.parametrize(("layer", "kind", "column"), PLACES)
def test_a_wrong_scale_in_an_artefact_is_found(platform, layer, kind, column, bundle_of, program, tmp_path):
    right = scales_of(program, layer, kind).astype(TARGETS[platform])
    wrong = right.copy()
    wrong[column] *= 3
    by_blocks = [(np.repeat(right, blocks), np.repeat(wrong, blocks)) for blocks in (1, 2, 3)]
    broken = altered_copy(bundle_of(platform), tmp_path / platform, by_blocks)
    report = blame(inputs(broken, short=True), ("artifact",))
    found = report.guilty
    assert found and (found.layer, found.kind) == (layer, kind)
    assert (found.columns, found.column) == (1, column)
    assert found.factor == pytest.approx(3, abs=0.1)
    assert found.error > 5 * found.expected or kind == "lm_head"
    assert f"{kind}, error" in verdict(report) and "column" in verdict(report)


@pytest.mark.parametrize("platform", TARGETS)
def test_a_wrong_rotary_table_is_found_where_keys_are_made(platform, bundle_of, program, tmp_path):
    cos = rotary_tables(program)[0].numpy()
    right = (cos if platform == "android" else cos[:, : cos.shape[1] // 2]).astype(TARGETS[platform])
    wrong = right.copy()
    wrong[3] = 0
    broken = altered_copy(bundle_of(platform), tmp_path / platform, [(right, wrong)])
    found = blame(inputs(broken, short=True), ("artifact",)).guilty
    assert (found.layer, found.kind) == (0, "self_attn.keys")


@pytest.mark.parametrize("platform", TARGETS)
def test_a_sound_bundle_blames_nobody(platform, bundle_of):
    report = blame(inputs(bundle_of(platform), short=True))
    assert report.guilty is None
    assert (report.stage, report.against) == ("artifact", "quantized")
    places = [(tap.layer, tap.kind) for tap in report.taps]
    assert len(set(places)) == len(places) == 31
    assert places[0] == (None, "embed_tokens") and places[-1] == (None, "lm_head")
    assert {kind.split(".")[0] for layer, kind in places if layer == 1} == {"self_attn", "mlp"}
    assert all(tap.error <= tap.expected * 1.5 for tap in report.taps)
    assert msgspec.json.decode(msgspec.json.encode(report), type=BlameReport) == report
    title, columns, rows = table(report)
    assert [row[0] for row in rows] == ["-", "0", "1", "-"] and {len(row) for row in rows} == {len(columns)}


def merged(table, more):
    """A table with some of its entries replaced, table by table."""
    nested = {name: merged(table[name], value) for name, value in more.items() if isinstance(value, dict)}
    return {**table, **more, **nested}


@pytest.fixture
def altered(sandbox_bundle, tmp_path, monkeypatch):
    """Inputs of blame whose cache holds one pass's program with a changed tensor."""
    root = tmp_path / "cache"
    shutil.copytree(cache.root(), root)
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(root))
    given = inputs(sandbox_bundle, short=True)
    checkpoint = resolve(given.checkpoint.spec)

    def change(last, end, edit, table=None):
        recipe = parse_recipe(merged(given.bundle.manifest.recipe.table, table or {}))
        if last is None:
            return Inputs(given.bundle, recipe, checkpoint, given.golden)
        program = passes.run(checkpoint, recipe, last=last).program
        exported = copy.copy(program.exported)
        (name,) = (name for name in exported.state_dict if name.endswith(end))
        before = exported.state_dict[name]
        tensor = before.detach().clone()
        edit(tensor)
        if isinstance(before, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=before.requires_grad)
        exported._state_dict = {**exported.state_dict, name: tensor}
        names = [one.name for one in passes.PASSES]
        keys = runner.keys_of(checkpoint, recipe, passes.PASSES)
        folder = runner._folder(keys[names.index(last)])
        shutil.rmtree(folder)
        folder.mkdir()
        programs.save(replace(program, exported=exported), folder, runner._source_weights(checkpoint))
        return Inputs(given.bundle, recipe, checkpoint, given.golden)

    return change


@pytest.mark.parametrize(
    ("last", "stage", "end"),
    [("trace", "traced", "1.mlp.gate_proj.weight"), ("quantize", "quantized", "1_mlp_gate_proj_scales")],
)
def test_a_wrong_row_in_a_program_is_found(last, stage, end, altered):
    def edit(tensor):
        tensor[3] *= 3

    report = blame(altered(last, end, edit))
    found = report.guilty
    assert (report.stage, found.layer, found.kind) == (stage, 1, "mlp.gate_proj")
    assert (found.columns, found.column) == (1, 3)


def test_a_wrong_matrix_of_a_rotated_program_is_found(altered):
    """A wrong o_proj shows where values are next in their own basis: behind it, before down_proj."""
    rotates = {"quantize": {"rotate": True}}

    def edit(tensor):
        tensor[3] *= 3

    sound = altered(None, "", edit, rotates)
    assert blame(sound, ("rotated", "quantized")).guilty is None
    report = blame(altered("rotate", "0.self_attn.o_proj.weight", edit, rotates))
    assert (report.stage, report.against) == ("rotated", "traced")
    assert (report.guilty.layer, report.guilty.kind) == (0, "mlp.gate_proj")


@pytest.mark.parametrize(("kind", "column"), [("gate_proj", 100), ("up_proj", 190), ("down_proj", 17)])
def test_a_wrong_scale_of_an_mlp_in_parts_is_found(kind, column, in_parts, tmp_path):
    """The matrix is named, and the column of the whole."""
    bundle, program = in_parts
    right = scales_of(program, 1, f"mlp.{kind}")
    piece = right if kind == "down_proj" else np.split(right, 2)[column // 96]
    wrong = piece.copy()
    wrong[column % 96] *= 3
    broken = altered_copy(bundle, tmp_path / "android", [(piece, wrong)])
    found = blame(inputs(broken, short=True), ("artifact",)).guilty
    assert (found.layer, found.kind, found.columns, found.column) == (1, f"mlp.{kind}", 1, column)
    assert found.factor == pytest.approx(3, abs=0.1)


def test_a_sound_mlp_in_parts_blames_nobody(in_parts):
    report = blame(inputs(in_parts[0], short=True))
    assert report.guilty is None and len(report.taps) == 31
    assert all(tap.error <= tap.expected * 1.5 for tap in report.taps)


def test_what_is_not_finite_is_found(altered):
    def edit(tensor):
        tensor[0] = float("inf")

    report = blame(altered("quantize", "0_self_attn_o_proj_scales", edit), ("quantized",))
    assert (report.guilty.layer, report.guilty.kind) == (0, "self_attn.o_proj")
    assert report.guilty.error is None and "not finite" in verdict(report)


def test_command(cli, bundle_of, tmp_path):
    bundle = bundle_of("onnx")
    done = cli("blame", bundle.folder, "--stage", "artifact", "--json")
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout, type=BlameReport).guilty is None
    broken = tmp_path / "broken"
    shutil.copytree(bundle.folder, broken)
    with (broken / "model.onnx.data").open("r+b") as file:
        file.write(b"\1")
    refused = cli("blame", broken)
    assert refused.returncode == 2 and "was altered" in refused.stderr
