"""What is written beside the model, in the hands of those who read it: ONNX Runtime's tools and genai."""

import json
import subprocess
import sys

import numpy as np
import onnx as onnx_package
import pytest

from mobile_export.checkpoint.load import eos_ids
from mobile_export.recipe import ONNX as Options
from mobile_export.targets import onnx
from mobile_export.targets.onnx_deploy import (
    GENAI_CONFIG,
    GENAI_MODEL,
    cpu_features,
    genai_config,
    genai_model,
    required_operators,
)

FAMILIES = ("qwen2", "qwen3", "llama")
PROMPT = [3 + 37 * index % 1000 for index in range(20)]
LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_LAYOUT", "ENABLE_ALL")
OPTIONS = (Options(), Options(accuracy_level=0), Options(block=32, kv_cache="fp16"))


@pytest.fixture(scope="module", params=FAMILIES)
def small(request, programs_of, spec):
    """(checkpoint, quantized program)"""
    checkpoint, _, quantized = programs_of(spec(request.param))
    return checkpoint, quantized


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The model with each set of options and what belongs beside it."""
    base = tmp_path_factory.mktemp("deploy")

    def make(options=OPTIONS[0], chunk=128):
        path = base / f"{options.kv_cache}-{options.block}-{options.accuracy_level}-{chunk}"
        if not path.exists():
            path.mkdir()
            checkpoint, quantized = small
            onnx.lower(quantized, options, path / "model.onnx")
            genai_model(path / "model.onnx", path / GENAI_MODEL)
            (path / GENAI_CONFIG).write_bytes(configured(checkpoint, quantized.dims, chunk))
        return path

    return make


def configured(checkpoint, dims, chunk):
    tokenizer = checkpoint.tokenizer()
    return genai_config(
        dims,
        family=checkpoint.family,
        eos_ids=eos_ids(checkpoint),
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        chunk=chunk,
    )


@pytest.fixture(scope="module")
def genai():
    """onnxruntime-genai, its telemetry off."""
    onnx.runtime()
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai does not import here")


def theirs(models, levels, out):
    """What ONNX Runtime's own tool writes for what the runtime saves at each optimization level."""
    ort = onnx.runtime()
    from onnxruntime.tools.ort_format_model import create_config_from_models

    saved = []
    for level in levels:
        for number, model in enumerate(models):
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
            options.optimized_model_filepath = str(out / f"{level}{number}.ort")
            options.add_session_config_entry("session.save_model_format", "ORT")
            ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            saved.append(out / f"{level}{number}.ort")
    create_config_from_models(saved, out / "theirs.config", False)
    return parsed((out / "theirs.config").read_text())


def parsed(text):
    rows = [line.split(";") for line in text.splitlines() if not line.startswith("#")]
    return {(domain, int(opset)): set(ops.split(",")) for domain, opset, ops in rows}


@pytest.mark.parametrize("options", OPTIONS, ids=("int8", "fp32", "fp16 cache"))
def test_operators_are_those_of_the_runtimes_tool_at_every_level(folder, options, tmp_path):
    path = folder(options)
    ours = required_operators(path / "model.onnx")
    assert parsed(ours) == theirs([path / "model.onnx", path / GENAI_MODEL], LEVELS, tmp_path)
    assert "ai.onnx;23;" in ours and ",MatMulNBits," in ours and ours.endswith("\n")
    assert required_operators(path / GENAI_MODEL) == ours


def test_operators_of_fp32_weights(programs_of, spec, tmp_path):
    onnx.lower(programs_of(spec())[1], OPTIONS[1], tmp_path / "model.onnx")
    ours = required_operators(tmp_path / "model.onnx")
    assert parsed(ours) == theirs([tmp_path / "model.onnx"], LEVELS, tmp_path)
    assert "Gemm" in ours and "MatMulNBits" not in ours


def test_the_runtimes_build_script_reads_them(folder, tmp_path):
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    file = tmp_path / "required_operators.config"
    file.write_text(required_operators(folder() / "model.onnx"))
    operators, types = parse_config(str(file))
    assert types is None and operators["com.microsoft"][1] >= {"MatMulNBits", "GroupQueryAttention"}
    assert operators["ai.onnx"][13] >= {"Gather", "Concat"}


def test_the_genai_model_is_the_model_without_its_choice(folder, tmp_path):
    path = folder()
    onnx_package.checker.check_model(path / GENAI_MODEL)
    genai_model(path / "model.onnx", path / "again.onnx")
    assert (path / "again.onnx").read_bytes() == (path / GENAI_MODEL).read_bytes()
    (path / "again.onnx").unlink()
    session = onnx.runtime().InferenceSession(str(path / GENAI_MODEL), providers=["CPUExecutionProvider"])
    assert "positions" not in [value.name for value in session.get_inputs()]
    assert session.get_outputs()[0].shape == [1, 1, 1024]
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()[2:]
    }
    given = {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64), **empty}
    assert np.array_equal(
        session.run(["logits"], given)[0][0, 0],
        onnx.open(path / "model.onnx").last_logits(PROMPT, 0),
    )


def test_the_config_says_the_models_sizes_and_names(small, folder):
    checkpoint, quantized = small
    said = json.loads((folder() / GENAI_CONFIG).read_bytes())
    model, dims = said["model"], quantized.dims
    assert (model["type"], model["context_length"], model["vocab_size"]) == (checkpoint.family, 64, 1024)
    tokenizer = checkpoint.tokenizer()
    assert model["eos_token_id"] == eos_ids(checkpoint) and model["pad_token_id"] == tokenizer.pad_token_id
    assert model.get("bos_token_id") == tokenizer.bos_token_id
    assert model["decoder"]["head_size"] == dims.head_dim
    graph = onnx_package.load(folder() / GENAI_MODEL, load_external_data=False).graph
    for values, names in ((graph.input, "inputs"), (graph.output, "outputs")):
        patterns = model["decoder"][names].values()
        filled = {one % layer if "%" in one else one for one in patterns for layer in range(dims.layers)}
        assert filled == {value.name for value in values}


def test_a_model_without_bos_or_pad(small):
    given = {"family": "qwen2", "eos_ids": [7, 9], "bos_id": None, "pad_id": None, "chunk": 128}
    model = json.loads(genai_config(small[1].dims, **given))["model"]
    assert "bos_token_id" not in model and model["pad_token_id"] == 7
    full = json.loads(genai_config(small[1].dims, **{**given, "bos_id": 0, "pad_id": 3}))["model"]
    assert (full["bos_token_id"], full["pad_token_id"]) == (0, 3)


@pytest.mark.parametrize(
    ("options", "chunk"), [(OPTIONS[0], 128), (OPTIONS[0], 7), (OPTIONS[2], 128)], ids=str
)
def test_genai_generates_what_our_runner_does(genai, folder, options, chunk):
    """Greedy, token by token; a chunk of 7 cuts the prompt of 20 as calls of 7 do."""
    path = folder(options, chunk)
    generated = answer(genai, path, PROMPT, 40)
    runner = onnx.open(path / "model.onnx")
    for at in range(0, len(PROMPT), chunk):
        row = runner.last_logits(PROMPT[at : at + chunk], at)
    expected = []
    while len(expected) < len(generated):
        expected.append(int(row.argmax()))
        row = runner.last_logits(expected[-1:], len(PROMPT) + len(expected) - 1)
    assert generated == expected
    assert len(set(generated)) > 5
    assert len(generated) == 40 or generated[-1] in eos_of(path)


def answer(genai, path, prompt, count):
    model = genai.Model(str(path))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(np.array(prompt, np.int32))
    made = []
    while len(made) < count and not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return made


def eos_of(path):
    return json.loads((path / GENAI_CONFIG).read_bytes())["model"]["eos_token_id"]


def test_what_the_cpu_must_have():
    assert cpu_features(4) == ["arm64:asimddp"] and cpu_features(0) == []


def test_nothing_here_loads_the_runtime(folder):
    code = "import sys; from pathlib import Path; from mobile_export.targets import onnx_deploy as d\n"
    code += "d.required_operators(Path(sys.argv[1])); assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder() / "model.onnx")], check=True, timeout=60)
