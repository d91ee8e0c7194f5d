"""`.onnx` files under `inspect`: our own, others', damaged ones."""

import subprocess
import sys
from contextlib import suppress

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from test_bundle import make_manifest

from mobile_export import bundle
from mobile_export.errors import ExportError
from mobile_export.inspect import inspect, render
from mobile_export.onnx_look import OnnxValue, open_model, read
from mobile_export.recipe import ONNX as Options
from mobile_export.targets import onnx as target


@pytest.fixture(scope="module")
def ours(programs_of, spec, tmp_path_factory):
    path = tmp_path_factory.mktemp("look") / "model.onnx"
    target.lower(programs_of(spec())[2], Options(), path)
    return path


def other(folder, location="weights.bin", offset=0, length=48, size=80, dims=(3, 4)):
    """A product of an input and a weight in a file beside the model, the weight's type fp32."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=dims)
    weight.raw_data = b""
    set_external_data(weight, location, 0, length)
    weight.ClearField("raw_data")
    weight.external_data[1].value = str(offset)
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(4, np.float16)))],
        "then",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT16, [4])],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
            helper.make_node("Fused", ["y"], ["z"], domain="org.example"),
            helper.make_node("If", ["condition"], ["w"], then_branch=then, else_branch=then),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [weight, numpy_helper.from_array(np.zeros((2, 3), np.int8), "small")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("org.example", 2)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="me")
    folder.mkdir(exist_ok=True)
    (folder / "other.onnx").write_bytes(model.SerializeToString())
    if size is not None:
        (folder / "weights.bin").write_bytes(bytes(size))
    return folder / "other.onnx"


def test_ours(ours, capsys):
    report = inspect(ours)
    assert report.kind == "onnx" and report.bytes == sum(
        file.stat().st_size for file in ours.parent.iterdir()
    )
    found = report.onnx
    assert found.opsets == {"ai.onnx": 23, "com.microsoft": 1} and found.ir_version == 11
    assert found.producer == "mobile-export"
    assert found.operators["com.microsoft:MatMulNBits"] == 9 and found.operators["Gather"] == 2
    assert found.inputs[0] == OnnxValue("input_ids", "int64", [1, "length"])
    assert found.inputs[2] == OnnxValue("past_key_values.0.key", "fp32", [1, 2, "past", 16])
    assert [value.name for value in found.inputs if value.optional] == ["positions"]
    assert found.outputs[0] == OnnxValue("logits", "fp32", [1, "read", 1024])
    assert found.data_files == {"model.onnx.data": ours.with_name("model.onnx.data").stat().st_size}
    assert len(found.int8_codes) == 15 and [1024, 64] in found.int8_codes.values()
    codes = sum(rows * columns for rows, columns in found.int8_codes.values())
    assert found.weights["uint8"] == codes + 1024 * 64, "the head, as a slice"
    assert found.shared_bytes == 1024 * 64 + 1024 * 4, "its codes and scales"
    render(report)
    shown = capsys.readouterr().out
    for part in ("2 past_key_values.*.key fp32 [1, 2, past, 16]", "positions int64 [read] or its default"):
        assert part in shown
    for part in ("ai.onnx 23, com.microsoft 1, by mobile-export", "15 tensors", "of these shared"):
        assert part in shown


def test_anothers_with_subgraphs_and_a_domain_of_its_own(tmp_path, capsys):
    path = other(tmp_path)
    found = read(path)
    assert found.operators == {"Constant": 2, "MatMul": 1, "org.example:Fused": 1, "If": 1}
    assert found.weights == {"fp16": 16, "fp32": 48, "int8": 6} and found.data_files == {"weights.bin": 80}
    assert found.int8_codes == {} and found.shared_bytes == 0
    assert found.outputs == [OnnxValue("z", "fp32", [])]
    render(inspect(path))
    assert "org.example:Fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, "'other.onnx' lacks its data file 'weights.bin'"),
        ({"size": 47}, "'weights.bin' is cut short: it has 47 bytes, not 48"),
        ({"offset": 40}, "'weights.bin' is cut short: it has 80 bytes, not 88"),
        ({"location": "../weights.bin"}, "'../weights.bin' leads out of its folder"),
        ({"location": "/etc/hostname"}, "'/etc/hostname' leads out of its folder"),
        ({"location": ""}, "does not say where 'weight' is"),
        ({"location": "a\0b"}, "does not say where 'weight' is"),
        ({"offset": -8}, "does not say where 'weight' is"),
        ({"offset": "x"}, "does not say where 'weight' is"),
        ({"length": 44}, "does not say where 'weight' is"),
        ({"dims": (-3, -4)}, "does not say where 'weight' is"),
        ({"dims": (3, -4)}, "does not say where 'weight' is"),
    ],
)
def test_weights_that_are_not_there(tmp_path, change, message):
    (tmp_path / "weights.bin").write_bytes(bytes(80))
    path = other(tmp_path / "model", **change)
    with pytest.raises(ExportError) as raised:
        inspect(path)
    assert message in raised.value.message and "\n" not in str(raised.value)


def test_a_link_that_leads_out_is_refused(tmp_path):
    path = other(tmp_path / "model", size=None)
    (tmp_path / "weights.bin").write_bytes(bytes(80))
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ExportError, match="leads out of its folder"):
        inspect(path)


def test_the_command_says_it_in_one_line(cli, tmp_path):
    done = cli("inspect", other(tmp_path, size=None))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 'other.onnx' lacks its data file") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"hello, hello, hello", b"\x08\x0b", bytes(100)])
def test_no_model(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ExportError, match="'bad.onnx' is (damaged or )?not an ONNX model"):
        inspect(tmp_path / "bad.onnx")


def test_a_damaged_model_never_crashes(tmp_path):
    path = other(tmp_path)
    data = path.read_bytes()
    refused = 0
    for at in range(len(data)):
        for bits in (0xFF, 0x01, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
            try:
                msgspec.json.encode(read(path))
            except ExportError:
                refused += 1
    assert refused > len(data) // 2
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with suppress(ExportError):
            read(path)


def test_a_metadata_that_is_not_ours(ours, tmp_path):
    model = onnx.load(ours, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "codes").value = '{"a": [1, "x"]}'
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(ours.with_name("model.onnx.data").read_bytes())
    with pytest.raises(ExportError, match="its metadata 'codes'"):
        inspect(path)


@pytest.fixture
def packed(ours, tmp_path):
    """A bundle as the ONNX target writes one."""
    made, replace = make_manifest(), msgspec.structs.replace
    needs = replace(made.runtime, name="ONNX Runtime", backends=[], cpu_features=["arm64:asimddp"])
    made = replace(made, platform="onnx", target="onnx", runtime=needs)
    with bundle.create(tmp_path / "onnx") as draft:
        for name in ("model.onnx", "model.onnx.data"):
            draft.path(name, "program").write_bytes(ours.with_name(name).read_bytes())
        draft.path("genai_config.json", "runtime-config").write_bytes(b"{}")
        draft.finish(made)
    return tmp_path / "onnx"


def test_a_bundle(packed, capsys):
    report = inspect(packed)
    assert report.onnx == read(packed / "model.onnx") and report.kind == "bundle"
    render(report)
    shown = capsys.readouterr().out
    assert "com.microsoft:GroupQueryAttention" in shown and "arm64:asimddp" in shown
    assert "runtime-config" in shown and "portable" not in shown


def test_a_bundle_without_its_data_file(packed):
    (packed / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match="the bundle lacks 'model.onnx.data'"):
        inspect(packed)


def test_inspecting_loads_no_runtime(ours):
    code = "import sys; from pathlib import Path; from mobile_export.inspect import inspect\n"
    code += "inspect(Path(sys.argv[1])); assert not {'onnxruntime', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(ours)], check=True, timeout=60)
    assert open_model(ours).graph.name == "decoder"
