"""What an artefact's bytes are for: to the byte, and the same weights in every target."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mobile_export.bundle import load
from mobile_export.errors import ExportError
from mobile_export.export import export_all
from mobile_export.recipe import recipe_folder
from mobile_export.report.pte_tensors import pte_tensors
from mobile_export.report.sizes import Claim, classify, parts, tally
from mobile_export.targets.onnx_weights import codes_of


def test_they_add_up_to_the_artefact(folders):
    for folder in folders.values():
        opened = load(folder)
        found = parts(opened)
        artefact = [file.bytes for file in opened.manifest.files.values() if file.role == "program"]
        assert sum(one.bytes for one in found) == sum(artefact)
        assert all(one.bytes > 0 for one in found)
        assert len({(one.group, one.name) for one in found}) == len(found)


def test_every_target_has_the_same_weights(folders):
    hidden, inner, vocab, layers = 64, 192, 1024, 2
    square, narrow, wide = (layers * hidden * rows for rows in (hidden, hidden // 2, inner))
    for folder in folders.values():
        assert {(one.group, one.name): one.bytes for one in weights(folder)} == {
            ("embedding", "embedding and head"): vocab * hidden,
            ("attention", "q_proj"): square,
            ("attention", "k_proj"): narrow,
            ("attention", "v_proj"): narrow,
            ("attention", "o_proj"): square,
            ("mlp", "gate_proj"): wide,
            ("mlp", "up_proj"): wide,
            ("mlp", "down_proj"): wide,
        }


@pytest.mark.parametrize("parts_of_mlps", [1, 4])
@pytest.mark.parametrize(("name", "tied"), [("qwen2", 1), ("qwen3", 0), ("llama", 0)])
def test_other_families_and_rotated_ones_with_their_mlps_in_parts(name, tied, parts_of_mlps, spec, tmp_path):
    text = (recipe_folder() / "sandbox.toml").read_text()
    recipe = tmp_path / "parts.toml"
    text = text.replace("[quantize]", f"[quantize]\nrotate = {str(parts_of_mlps > 1).lower()}")
    recipe.write_text(text.replace("[executorch]", f"[executorch]\nmlp_parts = {parts_of_mlps}"))
    made = export_all(model=spec(name, f"&tied={tied}"), context=64, recipe=str(recipe), out=tmp_path)
    found = [weights(Path(one.folder)) for one in made]
    assert found[0] == found[1] == found[2]
    assert found[0][0].bytes == (2 - tied) * 1024 * 64
    assert {one.name: one.bytes for one in found[0] if one.group == "mlp"} == {
        "gate_proj": 2 * 64 * 192,
        "up_proj": 2 * 64 * 192,
        "down_proj": 2 * 64 * 192,
    }


def test_a_ptes_weights_are_named_as_the_program_names_them(folders):
    """The codes at each place are those that the ONNX model has under that name."""
    codes = {
        name.removeprefix("backbone_").removesuffix("_codes"): digest(one)
        for name, one in codes_of(load(folders["onnx"]).path("program")).items()
    }
    path = load(folders["android"]).path("program")
    data = path.read_bytes()
    found = {
        name: digest(data[at : at + size])
        for name, at, size in pte_tensors(path)
        if "_proj" in name and "scale" not in name and "bias" not in name
    }
    assert found == {
        name.replace("self_attn_", "").replace("mlp_", ""): one
        for name, one in codes.items()
        if "_proj" in name
    }
    assert len(found) == 14


def test_shared_bytes_count_once_and_the_rest_is_padding():
    claims = [
        Claim("layers_0_self_attn_q_proj", "a", 10, 20),
        Claim("head", "a", 40, 40),
        Claim("head_slice", "a", 60, 20),
        Claim("layers_0_mlp_up_proj_bias", "b", 0, 5),
    ]
    found = {one.name: one.bytes for one in tally(claims, 100)}
    assert found == {"embedding and head": 40, "q_proj": 20, "biases": 5, "padding": 35}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers_0_self_attn_k_proj_weight_data", ("attention", "k_proj")),
        ("backbone.layers.3.mlp.down_proj.weight", ("mlp", "down_proj")),
        ("backbone_layers_0_mlp_gate_proj_codes_scales", ("overhead", "scales")),
        ("layers_0_self_attn_q_norm_weight_val", ("overhead", "norms and tables")),
        ("backbone_embed_tokens_codes", ("embedding", "embedding and head")),
        ("rotary_cos_val", ("overhead", "norms and tables")),
    ],
)
def test_a_name_says_what_a_tensor_is(name, kind):
    assert classify(name) == kind


def test_a_damaged_pte_is_refused(folders, tmp_path):
    whole = load(folders["android"]).path("program").read_bytes()
    path = tmp_path / "model.pte"
    for cut in (100, 5000):
        path.write_bytes(whole[:cut])
        with pytest.raises(ExportError, match="damaged"):
            list(pte_tensors(path))


def weights(folder):
    return [one for one in parts(load(folder)) if one.group != "overhead"]


def digest(codes):
    return hashlib.sha256(np.ascontiguousarray(codes)).hexdigest()
