"""A bundle's model card says what its manifest says, and nothing else."""

import re

import msgspec
import pytest

from mobile_export.bundle import load
from mobile_export.manifest import Runtime
from mobile_export.report.card import model_card

CLAIM = "Verified against the documented semantics of the program, not on the device."


@pytest.fixture(params=["android", "ios", "onnx"])
def bundle(request, folders):
    return load(folders[request.param])


def test_it_is_in_the_bundle_as_its_manifest_says_it(bundle):
    assert bundle.manifest.files["model_card.md"].role == "model-card"
    assert bundle.path("model-card").read_text("utf-8") == model_card(bundle.manifest)


def test_files_listed_or_not_the_text_is_the_same(bundle):
    unlisted = msgspec.structs.replace(bundle.manifest, files={})
    assert model_card(unlisted) == model_card(bundle.manifest)


def test_it_begins_with_metadata_for_hubs(bundle):
    card = model_card(bundle.manifest)
    head = re.fullmatch(r"---\n(.*?)\n---\n\n# .*", card, re.DOTALL)
    lines = dict(line.split(": ", 1) for line in head.group(1).splitlines())
    assert lines["license"] == "cc0-1.0"
    assert lines["pipeline_tag"] == "text-generation"
    assert lines["tags"] == f"[{bundle.manifest.target}, qwen2, int8, mobile-export]"


def test_every_tensor_and_figure_of_the_manifest_is_there(bundle):
    card, io = model_card(bundle.manifest), bundle.manifest.io
    for method in io.methods:
        for word, tensors in (("in", method.inputs), ("state", method.states), ("out", method.outputs)):
            for tensor in tensors[:1] + tensors[-1:]:
                assert f"`{tensor.name}`" in card and f"| {method.name} | {word} |" in card
    for stage, figures in bundle.manifest.quality.items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {stage} |")]
        assert f" {figures['positions']} " in row and f" {figures['kl_mean']:.4g} " in row
    assert bundle.manifest.model.digest in card and bundle.manifest.recipe.digest in card


def test_core_mls_figures_come_with_what_they_do_not_show(bundle):
    card = model_card(bundle.manifest)
    assert card.count(CLAIM) == (1 if bundle.manifest.target == "coreml" else 0)
    if bundle.manifest.target == "coreml":
        assert card.index("## How near") < card.index(CLAIM) < card.index("## Where it comes from")


def test_many_tensors_alike_take_one_row(folders):
    card = model_card(load(folders["onnx"]).manifest)
    assert "| main | in | `past_key_values.0.key` to `past_key_values.1.value`, 4 | fp32 |" in card


def test_what_a_device_needs(bundle):
    needs = Runtime(
        name="R", minimum_version="9", backends=["B"], kernels=["k"], cpu_features=["arm64:f"], notes=["N."]
    )
    made = msgspec.structs.replace(bundle.manifest, runtime=needs)
    card = model_card(made)
    assert "- R 9 or later\n- in it: B, k\n- of the CPU: arm64:f\n\nN.\n" in card


def test_weights_that_are_not_quantized_are_not_called_int8(bundle):
    table = {**bundle.manifest.recipe.table, "quantize": {"weights": "fp32"}}
    recipe = msgspec.structs.replace(bundle.manifest.recipe, table=table)
    card = model_card(msgspec.structs.replace(bundle.manifest, recipe=recipe))
    assert "with fp32 weights" in card and "int8" not in card.replace("int8 activations", "")
