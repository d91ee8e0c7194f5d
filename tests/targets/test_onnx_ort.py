"""`.ort` files in the real ONNX Runtime."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mobile_export
from mobile_export.errors import ExportError
from mobile_export.flatbuffer import Table
from mobile_export.recipe import ONNX as Options
from mobile_export.targets import onnx
from mobile_export.targets.onnx_deploy import required_operators
from mobile_export.targets.onnx_graph import build
from mobile_export.targets.onnx_ort import KERNELS, MODEL, to_ort

TOKENS = [3 + 37 * index % 1000 for index in range(64)]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def quantized(request, programs_of, spec):
    return programs_of(spec(request.param))[2]


@pytest.fixture(scope="module")
def model(quantized, tmp_path_factory):
    """The head in four slices, as a large one is."""
    return written(quantized, tmp_path_factory.mktemp("ort") / "model.onnx")


def written(program, path):
    with onnx.ModelFile(path) as file:
        codes = build(program, Options(), file, slice_bytes=300 * 64)
        file.save({"codes": codes, "context": 64, "vocab": 1024})
    return path


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("ort") / "model.ort"
    to_ort(model, out)
    return out


def test_it_says_what_the_onnx_says(model, converted):
    for lone in (model, converted):
        assert onnx.open(lone).context == 64
    theirs, ours = onnx.open(model), onnx.open(converted)
    assert np.abs(theirs.logits(TOKENS, 0) - ours.logits(TOKENS, 0)).max() < 1e-5
    for at in range(0, 64, 16):
        last = [runner.last_logits(TOKENS[at : at + 16], at) for runner in (theirs, ours)]
        assert np.abs(last[0] - last[1]).max() < 1e-5
    assert list(converted.parent.iterdir()) == [converted]


def test_tied_codes_stand_once_and_little_is_added(model, converted, quantized):
    head = next(
        tensor
        for tensor in quantized.exported.state_dict.values()
        if tuple(tensor.shape) == (1024, 64) and tensor.dtype == torch.int8
    )
    data = converted.read_bytes()
    assert data.count((head.numpy().view(np.uint8) ^ 128).tobytes()) == 1
    weights = model.with_name("model.onnx.data").stat().st_size
    assert len(data) < weights + 4 * 1024 + 40_000, "the head's scales, nodes and names"


def test_an_untied_head_keeps_its_slices(programs_of, spec, tmp_path):
    program = programs_of(spec(more="&tied=0"))[2]
    path = written(program, tmp_path / "model.onnx")
    to_ort(path, tmp_path / "model.ort")
    data = (tmp_path / "model.ort").read_bytes()
    large = [t for t in program.exported.state_dict.values() if tuple(t.shape) == (1024, 64)]
    stored = [(tensor.numpy().view(np.uint8) ^ 128) for tensor in large if tensor.dtype == torch.int8]
    assert sorted(data.count(array.tobytes()) for array in stored) == [0, 1]
    assert all(
        data.count(array[at : at + 256].tobytes()) == 1 for array in stored for at in range(0, 1024, 256)
    )
    expected = onnx.open(path).logits(TOKENS, 0)
    assert np.abs(onnx.open(tmp_path / "model.ort").logits(TOKENS, 0) - expected).max() < 1e-5


def test_weights_in_fp32_have_no_slices(programs_of, spec, tmp_path):
    path = written(programs_of(spec())[1], tmp_path / "model.onnx")
    to_ort(path, tmp_path / "model.ort")
    expected = onnx.open(path).logits(TOKENS, 0)
    assert np.abs(onnx.open(tmp_path / "model.ort").logits(TOKENS, 0) - expected).max() < 1e-5


def test_every_process_writes_the_same_bytes(model, converted, tmp_path):
    code = "import sys; from pathlib import Path; from mobile_export.targets.onnx_ort import to_ort\n"
    code += "to_ort(Path(sys.argv[1]), Path(sys.argv[2]))"
    paths = os.pathsep.join([str(Path(mobile_export.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for number in range(3):
        out = tmp_path / ("x" * (1 + 40 * number) + ".ort")
        env = {**os.environ, "PYTHONPATH": paths, "MORE": "x" * 1000 * number}
        subprocess.run([sys.executable, "-c", code, str(model), str(out)], env=env, check=True, timeout=120)
        assert out.read_bytes() == converted.read_bytes()


def test_the_runtimes_own_reader_reads_it(model, converted, tmp_path):
    onnx.runtime()
    from onnxruntime.tools.ort_format_model import create_config_from_models

    create_config_from_models([converted], tmp_path / "theirs.config", False)
    listed = [line for line in (tmp_path / "theirs.config").read_text().splitlines() if line[0] != "#"]
    sliced = required_operators(model).replace("Concat,", "")
    assert "\n".join(listed) + "\n" == sliced, "the head's slices were joined"
    root = Table.root(converted.read_bytes())
    assert [entry.text(0) for entry in root.table(KERNELS).tables(0)]
    assert root.table(MODEL).text(2) == "mobile-export"


def test_a_model_without_its_weights_is_refused_and_nothing_is_left(model, tmp_path):
    shutil.copy(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"did not convert 'model.onnx'"):
        to_ort(tmp_path / "model.onnx", tmp_path / "model.ort")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
