"""int4 weights: what the `.onnx` holds and says, and that the commands around a bundle know them."""

import hashlib

import numpy as np
import onnx as onnx_package
import pytest
from onnx.external_data_helper import ExternalDataInfo

from mobile_export import bundle, passes
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.export import export
from mobile_export.inspect import inspect
from mobile_export.lint import lint
from mobile_export.parity import kl_divergence
from mobile_export.recipe import ONNX as Options
from mobile_export.recipe import load_recipe
from mobile_export.report.sizes import parts
from mobile_export.stages import inputs, parity
from mobile_export.taps.blame import blame
from mobile_export.targets import onnx, reference
from mobile_export.targets.onnx_file import data_file
from mobile_export.targets.onnx_weights import codes_of, pieces_of

TOKENS = [3 + 37 * index % 1000 for index in range(64)]
RECIPE = """
[quantize]
weights = "int4"
group_size = {group}
rotate = {rotate}
[parity]
quantized = {{ kl_mean = 0.5, top1 = 0.3 }}
artifact = {{ kl_mean = 0.02, top1 = 0.7 }}
total = {{ kl_mean = 0.5, top1 = 0.3 }}
cut = {{ kl_max = 0.3, margin = 2.0 }}
"""
"""A random model's logits are nearly flat and its weights have no structure: 4 bits cost much."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe's file, by group and rotation."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(group=32, rotate="false"):
        path = folder / f"int4-{group}-{rotate}.toml"
        path.write_text(RECIPE.format(group=group, rotate=rotate))
        return str(path)

    return write


@pytest.fixture(scope="module")
def quantized(spec, recipe):
    """The program of a family, by group."""

    def run(family="qwen2", group=32, rotate="false"):
        return passes.run(resolve(spec(family)), load_recipe(recipe(group, rotate), context=64)).program

    return run


@pytest.fixture(scope="module")
def made(spec, recipe, tmp_path_factory):
    """The bundle of the rotated model."""
    out = tmp_path_factory.mktemp("int4") / "onnx"
    export("onnx", model=spec(), recipe=recipe(rotate="true"), context=64, out=out)
    return bundle.load(out)


def kl(reference_logits, logits):
    totals = [np.logaddexp.reduce(rows.astype(np.float64), axis=1) for rows in (reference_logits, logits)]
    return kl_divergence(reference_logits, totals[0], logits, totals[1])


def codes_in(program):
    state = program.exported.state_dict
    return {name: tensor.numpy() for name, tensor in state.items() if name.endswith("_codes")}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_it_says_what_the_program_says(quantized, family, group, tmp_path):
    program = quantized(family, group)
    onnx.lower(program, Options(accuracy_level=0), tmp_path / "exact.onnx")
    onnx.lower(program, Options(block=64), tmp_path / "model.onnx")
    expected = reference.open(program).logits(TOKENS, 0)
    exact, runner = (onnx.open(tmp_path / f"{name}.onnx") for name in ("exact", "model"))
    assert np.abs(exact.logits(TOKENS, 0) - expected).max() < 1e-4
    assert np.abs(exact.last_logits(TOKENS, 0) - expected[-1]).max() < 1e-4
    found = kl(expected, runner.logits(TOKENS, 0))
    assert 1e-7 < found.mean() < 0.01 and found.max() < 0.1, "int8 activations"


@pytest.mark.parametrize("rotate", ["false", "true"])
def test_codes_and_scales_come_back_bit_for_bit(quantized, rotate, tmp_path):
    program, path = quantized(rotate=rotate), tmp_path / "model.onnx"
    onnx.lower(program, Options(), path)
    expected, found = codes_in(program), codes_of(path)
    assert len(expected) == 15 + (rotate == "true") and found.keys() == expected.keys()
    assert all(np.array_equal(found[name], codes) for name, codes in expected.items())
    proto = onnx_package.load(path, load_external_data=False)
    bits = {name: piece.bits for name, piece in pieces_of(proto).items()}
    (whole,) = (name for name, count in bits.items() if count == 8)
    assert expected[whole].shape == (1024, 64), "the embedding, which is the head"
    state, data = program.exported.state_dict, data_file(path).read_bytes()
    scales = [state[name.replace("_codes", "_scales")].numpy() for name in bits if bits[name] == 4]
    assert {array.shape[1] for array in scales} <= {2, 6} and all(array.tobytes() in data for array in scales)


def test_the_runtimes_products_read_them_two_a_byte(quantized, tmp_path):
    """By the node and the initializer that it names: the even column is the low half, 8 is code 0."""
    program, path = quantized(), tmp_path / "model.onnx"
    onnx.lower(program, Options(), path)
    graph = onnx_package.load(path, load_external_data=False).graph
    node = next(node for node in graph.node if node.op_type == "MatMulNBits" and "down" in node.input[1])
    attributes = {one.name: one.i for one in node.attribute}
    assert attributes == {"K": 192, "N": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
    tensor = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    where = ExternalDataInfo(tensor)
    assert list(tensor.dims) == [64, 6, 16]
    stored = data_file(path).read_bytes()[where.offset : where.offset + where.length]
    codes = codes_in(program)[node.input[1]]
    ends = [codes[0, 0] + 8, codes[0, 1] + 8, codes[-1, -1] + 8]
    assert [stored[0] & 15, stored[0] >> 4, stored[-1] >> 4] == ends


def test_the_same_program_gives_the_same_bytes(quantized, tmp_path):
    digests = []
    for name in ("a", "b"):
        path = tmp_path / name / "model.onnx"
        path.parent.mkdir()
        onnx.lower(quantized(rotate="true"), Options(), path)
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, data_file(path))])
    assert digests[0] == digests[1]


def test_groups_that_do_not_divide_a_width_are_refused(spec, recipe, tmp_path):
    with pytest.raises(
        ExportError, match="groups of 128 columns do not divide the 64 of '.*q_proj"
    ) as raised:
        export("onnx", model=spec(), recipe=recipe(128), context=64, out=tmp_path / "out")
    assert "group_size" in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_stages_keep_their_limits_and_nobody_is_to_blame(made):
    given = inputs(made, short=True)
    report = parity(given)
    assert report.passed, report
    assert blame(given).guilty is None


def test_a_wrong_group_is_found(made, tmp_path):
    given = inputs(made, short=True)
    state = passes.run(given.checkpoint, given.recipe).program.exported.state_dict
    (name,) = (name for name in state if "layers_1_mlp_down_proj_scales" in name)
    right = state[name].numpy()
    wrong = right.copy()
    wrong[17] *= 3
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes().replace(right.tobytes(), wrong.tobytes()))
    found = blame(inputs(bundle.Bundle(folder, made.manifest), short=True), ("artifact",)).guilty
    assert found and (found.layer, found.kind, found.column) == (1, "mlp.down_proj", 17)


def test_others_read_it(made):
    seen = inspect(made.folder).onnx
    assert (len(seen.int8_codes), len(seen.int4_codes)) == (1, 15)
    assert all(finding.severity != "error" for finding in lint(made).findings)
    sizes = {one.name: one.bytes for one in parts(made)}
    assert sizes["down_proj"] == 2 * 64 * 192 // 2 and sizes["embedding and head"] == 1024 * 64
    assert sum(sizes.values()) == sum(
        file.bytes for file in made.manifest.files.values() if file.role == "program"
    )
    assert "with int4 weights" in (made.folder / "model_card.md").read_text("utf-8")
    assert made.manifest.runtime.cpu_features == ["arm64:asimddp"]


def test_the_recipe_of_that_name_is_for_this_target():
    recipe = load_recipe("int4")
    assert (recipe.quantize.weights, recipe.quantize.group_size) == ("int4", 32)
    assert recipe.quantize.rotate and recipe.quantize.rounding == "compensated"
