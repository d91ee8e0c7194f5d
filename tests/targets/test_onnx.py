"""The `.onnx` in the real ONNX Runtime against the quantized program, and what its files hold."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx as onnx_package
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

import mobile_export
from mobile_export.errors import ExportError
from mobile_export.parity import kl_divergence
from mobile_export.recipe import ONNX as Options
from mobile_export.rewrite import editable, reexport, swap
from mobile_export.targets import onnx, reference
from mobile_export.targets.onnx_file import PAGE, data_file
from mobile_export.targets.onnx_graph import build
from mobile_export.targets.onnx_weights import codes_of
from mobile_export.types import Program

FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 1000 for index in range(64)]
EXACT = Options(accuracy_level=0)
CUTS = {
    "one call": [0, 64],
    "chunks": [0, 7, 23, 24, 64],
    "token by token": list(range(65)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(request, programs_of, spec):
    return programs_of(spec(request.param))[2]


@pytest.fixture(scope="module")
def made(quantized, tmp_path_factory):
    """The model with each set of options, made once a family."""
    folder = tmp_path_factory.mktemp("onnx")

    def make(options=EXACT):
        path = folder / f"{options.kv_cache}-{options.block}-{options.accuracy_level}" / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            onnx.lower(quantized, options, path)
        return path

    return make


@pytest.fixture(scope="module")
def runner(made):
    return onnx.open(made())


@pytest.fixture(scope="module")
def expected(quantized):
    return reference.open(quantized).logits(TOKENS, 0)


def kl(reference_logits, logits):
    totals = [np.logaddexp.reduce(rows.astype(np.float64), axis=1) for rows in (reference_logits, logits)]
    return kl_divergence(reference_logits, totals[0], logits, totals[1])


def cut(runner, cuts):
    runner.reset()
    parts = [runner.logits(TOKENS[at:end], at) for at, end in zip(cuts, cuts[1:], strict=False)]
    return np.concatenate(parts)


def as_a_device(runner, prompt=20):
    """Rows from the prompt's last position on: the prompt, then token by token, in place."""
    runner.reset()
    rows = [runner.last_logits(TOKENS[:prompt], 0)]
    rows += [runner.last_logits(TOKENS[at : at + 1], at) for at in range(prompt, 64)]
    return np.stack(rows)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_it_says_what_the_quantized_program_says(runner, expected, cuts):
    said = cut(runner, cuts)
    assert said.shape == expected.shape and said.dtype == np.float32
    assert np.abs(said - expected).max() < 1e-4


def test_as_a_device_calls_it(runner, expected):
    assert np.abs(as_a_device(runner) - expected[19:]).max() < 1e-4


def test_the_two_ways_may_be_mixed(runner, expected):
    runner.reset()
    said = [runner.logits(TOKENS[:10], 0)[-1], runner.last_logits(TOKENS[10:20], 10)]
    said += [runner.logits(TOKENS[20:30], 20)[-1], runner.last_logits(TOKENS[30:31], 30)]
    assert np.abs(np.stack(said) - expected[[9, 19, 29, 30]]).max() < 1e-4


def test_a_new_sequence_does_not_hear_the_old_one(runner):
    fresh = runner.last_logits(TOKENS[:5], 0)
    runner.last_logits(TOKENS[5:64], 5)
    assert np.array_equal(runner.last_logits(TOKENS[:5], 0), fresh)
    other = runner.last_logits(TOKENS[5:6], 5)
    runner.last_logits([900, 901], 0)
    assert not np.allclose(runner.last_logits(TOKENS[2:6], 2), other, atol=1e-3), "history counts"


@pytest.mark.parametrize("block", [128, 32])
def test_int8_activations_cost_that_much_and_no_more(made, expected, block):
    runner = onnx.open(made(Options(block=block)), threads=2)
    for rows, said in ((expected, cut(runner, CUTS["one call"])), (expected[19:], as_a_device(runner))):
        found = kl(rows, said)
        assert 1e-7 < found.mean() < 0.01 and found.max() < 0.1


def test_an_fp16_cache_says_nearly_the_same(made, expected):
    runner = onnx.open(made(Options(kv_cache="fp16", accuracy_level=0)))
    assert runner.caches["0.key"].dtype == np.float16
    found = kl(expected[19:], as_a_device(runner))
    assert 0 < found.mean() < 1e-4


def test_it_holds_the_quantized_programs_codes_bit_for_bit(made, quantized):
    state = quantized.exported.state_dict
    expected = {name: tensor.numpy() for name, tensor in state.items() if name.endswith("_codes")}
    assert len(expected) == 15
    for options in (EXACT, Options(block=32)):
        found = codes_of(made(options))
        assert found.keys() == expected.keys()
        assert [sha(found[name]) for name in expected] == [sha(codes) for codes in expected.values()]


def test_products_read_those_codes_and_the_rows_own_scales(made, quantized):
    """By the initializers that the nodes name, not by the metadata."""
    path = made(Options(block=32))
    state = quantized.exported.state_dict
    known = {
        sha(state[name].numpy()): state[name[:-6] + "_scales"] for name in state if name.endswith("_codes")
    }
    products = [node for node in graph_of(path).node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 4 + 1
    found = set()
    for node in products:
        codes, scales = read(path, node.input[1]), read(path, node.input[2])
        assert (scales == scales[:, :1]).all(), "a row's blocks share its scale"
        rows = (codes.reshape(len(codes), -1) ^ 128).view(np.int8)
        for name, tensor in state.items():
            if name.endswith("_codes") and tensor.shape[1] == rows.shape[1]:
                at = np.flatnonzero((rows == tensor[0].numpy()).all(1))
                if len(at) and sha(rows[at[0] : at[0] + len(tensor)]) in known:
                    part = slice(at[0], at[0] + len(tensor))
                    assert sha(rows[part]) == sha(tensor.numpy())
                    assert np.array_equal(scales[part, 0], state[name[:-6] + "_scales"].numpy())
                    found.add(name)
    assert len(found) == len(known)


def test_tied_codes_stand_once_in_the_file(made, quantized):
    tensors = quantized.exported.state_dict.values()
    head = next(
        tensor for tensor in tensors if tuple(tensor.shape) == (1024, 64) and tensor.dtype == torch.int8
    )
    stored = (head.numpy().view(np.uint8) ^ 128).tobytes()
    path = made()
    assert data_file(path).read_bytes().count(stored) == 1
    assert path.read_bytes().count(stored) == 0
    (gather,) = (node for node in graph_of(path).node if node.op_type == "GatherBlockQuantized")
    assert read(path, gather.input[0]).tobytes() == stored


def test_an_untied_head_and_a_text_longer_than_one_call(programs_of, spec, tmp_path):
    context = onnx.CHUNK + 40
    quantized = programs_of(spec(more="&tied=0"), context)[2]
    path = tmp_path / "model.onnx"
    onnx.lower(quantized, EXACT, path)
    data = data_file(path).read_bytes()
    large = [t for t in quantized.exported.state_dict.values() if tuple(t.shape) == (1024, 64)]
    assert [data.count((t.numpy().view(np.uint8) ^ 128).tobytes()) for t in large] == [1, 1]
    tokens = [3 + 37 * index % 1000 for index in range(context)]
    expected = reference.open(quantized).logits(tokens, 0)
    runner = onnx.open(path)
    assert np.abs(runner.logits(tokens, 0) - expected).max() < 1e-4
    assert np.abs(runner.last_logits(tokens, 0) - expected[-1]).max() < 1e-4


def test_the_heads_slices_are_rows_of_the_one_tensor(quantized, made, expected, tmp_path):
    path = tmp_path / "model.onnx"
    with onnx.ModelFile(path) as file:
        build(quantized, EXACT, file, slice_bytes=300 * 64)
        file.save({"context": 64, "vocab": 1024})
    slices = [node for node in graph_of(path).node if node.name.startswith("logits_")]
    assert [node.attribute[[a.name for a in node.attribute].index("N")].i for node in slices] == [256] * 4
    assert data_file(path).read_bytes() == data_file(made()).read_bytes()
    assert np.abs(onnx.open(path).logits(TOKENS, 0) - expected).max() < 1e-4


def test_the_runtime_can_map_every_large_tensor(made):
    path = made()
    where = [ExternalDataInfo(tensor) for tensor in graph_of(path).initializer if tensor.external_data]
    assert len(where) > 20 and {info.location for info in where} == {"model.onnx.data"}
    assert all(info.offset % PAGE == 0 for info in where)
    assert max(info.offset + info.length for info in where) == data_file(path).stat().st_size
    assert path.stat().st_size < 100_000, "no large tensor is in the model itself"


def test_the_same_program_gives_the_same_bytes(quantized, made, tmp_path):
    onnx.lower(quantized, EXACT, tmp_path / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == made().with_name(name).read_bytes()


def test_fused_operators_and_nothing_else(made, quantized):
    path = made()
    onnx_package.checker.check_model(path)
    found = Counter((node.domain, node.op_type) for node in graph_of(path).node)
    heads = found.pop(("", "RMSNormalization")) - 1
    assert heads in (0, 4), "two head norms a layer in qwen3"
    reshapes = found.pop(("", "Reshape"))
    assert reshapes == 1 + 2 * heads
    splits = found.pop(("", "Split"))
    assert splits == (4 if heads else 2)
    assert found == {
        ("", "Shape"): 1,
        ("", "Cast"): 1,
        ("", "Squeeze"): 1,
        ("", "Sub"): 1,
        ("", "Gather"): 2,
        ("", "Mul"): 2,
        ("", "Concat"): 1,
        ("com.microsoft", "GatherBlockQuantized"): 1,
        ("com.microsoft", "GroupQueryAttention"): 2,
        ("com.microsoft", "MatMulNBits"): 9,
        ("com.microsoft", "QuickGelu"): 2,
        ("com.microsoft", "SkipSimplifiedLayerNormalization"): 4,
    }


def test_threads_do_not_change_what_it_says(made):
    one, two = (onnx.open(made(), threads=threads).logits(TOKENS, 0) for threads in (1, 2))
    assert np.abs(one - two).max() < 1e-4


def test_an_op_without_a_form_is_refused_by_its_name(programs_of, spec, tmp_path):
    program = programs_of(spec())[2]
    module = editable(program.exported)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default):
        swap(node, torch.ops.aten.sigmoid.default, node.args)
    other = Program(reexport(module, program), program.dims)
    with pytest.raises(ExportError, match=r"ONNX has no form for aten\.sigmoid"):
        onnx.lower(other, EXACT, tmp_path / "model.onnx")


def test_telemetry_is_off_before_the_runtime_loads():
    asked = "import os, sys; from mobile_export.targets import onnx; assert 'onnxruntime' not in sys.modules;"
    asked += "onnx.runtime(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env["PYTHONPATH"] = str(Path(mobile_export.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    sources = Path(mobile_export.__file__).parent.rglob("*.py")
    importing = [path.name for path in sources if "import onnxruntime" in path.read_text("utf-8")]
    assert importing == ["onnx.py"], "nothing else loads it"


def graph_of(path):
    return onnx_package.load(path, load_external_data=False).graph


def read(path, name):
    tensor = next(tensor for tensor in graph_of(path).initializer if tensor.name == name)
    where = ExternalDataInfo(tensor)
    dtype = onnx_package.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = data_file(path).read_bytes()[where.offset : where.offset + where.length]
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_unquantized_weights_are_exact_and_stand_once(programs_of, spec, tmp_path):
    checkpoint, traced, _ = programs_of(spec())
    path = tmp_path / "model.onnx"
    onnx.lower(traced, EXACT, path)
    said = onnx.open(path)
    rows = reference.open(traced).logits(TOKENS, 0)
    assert np.abs(said.logits(TOKENS, 0) - rows).max() < 1e-4
    assert np.abs(said.last_logits(TOKENS, 0) - rows[-1]).max() < 1e-4
    parameters = sum(tensor.numel() for tensor in checkpoint.model().parameters())
    tables = 2 * 64 * 16
    assert data_file(path).stat().st_size < 4 * (parameters + tables) + 40 * PAGE
