"""An ONNX bundle, written as `mobile-export onnx` writes it."""

import json
from pathlib import Path

import numpy as np
import onnx as onnx_package
import pytest

from mobile_export import bundle
from mobile_export.export import export
from mobile_export.recipe import recipe_folder
from mobile_export.targets import onnx

TOKENS = [3 + 37 * index % 1000 for index in range(40)]


@pytest.fixture(scope="module")
def made(spec, tmp_path_factory):
    """A bundle with the options given as TOML lines of [onnx]."""
    base = tmp_path_factory.mktemp("onnx")

    def write(lines):
        recipe = base / f"{len(list(base.iterdir()))}.toml"
        text = (recipe_folder() / "sandbox.toml").read_text("utf-8").split("[onnx]")
        after = text[1].split("\n\n", 1)[1]
        recipe.write_text(f"{text[0]}[onnx]\n{lines}\n\n{after}", "utf-8")
        result = export("onnx", model=spec(), recipe=str(recipe), context=64, out=base / recipe.stem)
        return bundle.load(Path(result.folder))

    return write


@pytest.fixture(scope="module")
def plain(made):
    return made("")


def test_it_has_what_a_deployment_needs(plain):
    names = {name for name, file in plain.manifest.files.items() if file.role == "runtime-config"}
    assert names == {"genai_config.json", "model_genai.onnx", "required_operators.config"}
    assert "GroupQueryAttention" in (plain.folder / "required_operators.config").read_text("utf-8")
    config = json.loads((plain.folder / "genai_config.json").read_bytes())
    assert config["model"]["decoder"]["filename"] == "model_genai.onnx"
    assert config["model"]["eos_token_id"] == plain.manifest.io.eos_ids
    onnx_package.checker.check_model(plain.folder / "model.onnx")


def test_the_manifest_names_what_the_runtime_takes(plain):
    (method,) = plain.manifest.io.methods
    session = onnx.open(plain.path("program")).session
    taken = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    assert {value.name for value in method.inputs} == taken
    assert [value.name for value in method.outputs] == [value.name for value in session.get_outputs()]
    assert plain.manifest.runtime.cpu_features == ["arm64:asimddp"]


def test_a_baseline_arm_variant_has_the_same_codes_and_asks_nothing_of_the_cpu(plain, made):
    bare = made("accuracy_level = 0")
    assert bare.manifest.runtime.cpu_features == []
    data = [(one.folder / "model.onnx.data").read_bytes() for one in (plain, bare)]
    assert data[0] == data[1]
    said = [onnx.open(one.path("program")).logits(TOKENS, 0) for one in (plain, bare)]
    assert 0 < np.abs(said[0] - said[1]).max() < 1


def test_an_ort_file_is_an_option(made):
    with_ort = made("ort = true")
    assert with_ort.path("program").name == "model.onnx"
    theirs, ours = (onnx.open(with_ort.folder / name) for name in ("model.onnx", "model.ort"))
    assert np.abs(theirs.logits(TOKENS, 0) - ours.logits(TOKENS, 0)).max() < 1e-5
