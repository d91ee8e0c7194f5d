import json
import re
import struct
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import msgspec
import pytest
import torch
from test_bundle import make_manifest

from mobile_export import bundle, pte
from mobile_export.errors import ExportError
from mobile_export.flatbuffer import Table
from mobile_export.inspect import inspect, render
from mobile_export.pte import Value
from mobile_export.tensors import write_tensors

CONSTANTS = {"get_max_seq_len": 128, "get_eos_ids": [2, 3], "use_kv_cache": True, "one": [7]}


class Tiny(torch.nn.Module):
    """One linear for XNNPACK, two operators it does not take, a state and a constant."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 16)
        self.register_buffer("state", torch.zeros(16))
        self.register_buffer("table", torch.rand(5, 16))

    def forward(self, x):
        self.state.add_(1)
        return self.linear(x).cumsum(0).cumsum(1) + self.state, self.table + x.sum()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = {"x": {0: torch.export.Dim("n", max=4)}}
    exported = torch.export.export(Tiny(), (torch.rand(3, 8),), dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(
        {"forward": exported}, partitioner=[XnnpackPartitioner()], constant_methods=CONSTANTS
    )
    path = tmp_path_factory.mktemp("pte") / "tiny.pte"
    path.write_bytes(lowered.to_executorch().buffer)
    return path


def test_a_pte_as_executorchs_own_deserialiser_reads_it(program):
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header

    data = program.read_bytes()
    theirs = _flatbuffer_to_program(data[: _get_extended_header(data).program_size])
    ours = pte.read(program)
    plan = theirs.execution_plan[0]
    method = ours.methods[0]
    assert [one.name for one in ours.methods] == ["forward"] and plan.name == "forward"
    assert method.planned_bytes == sum(plan.non_const_buffer_sizes)
    kernels = [
        call.instr_args for call in plan.chains[0].instructions if hasattr(call.instr_args, "op_index")
    ]
    assert sum(method.operators.values()) == len(kernels) > 2
    assert method.operators["aten::cumsum.out"] == 2
    assert set(method.operators) == {f"{one.name}.{one.overload}".rstrip(".") for one in plan.operators}
    assert method.delegates == {"XnnpackBackend": len(plan.delegates)}
    for mine, numbers in ((method.inputs, plan.inputs), (method.outputs, plan.outputs)):
        assert [one.shape for one in mine] == [plan.values[number].val.sizes for number in numbers]
    assert method.inputs == [Value("fp32", [4, 8], True)]
    assert ours.constants == {**CONSTANTS, "one": 7}
    assert sum(ours.segments.values()) - ours.segments["program"] == sum(one.size for one in theirs.segments)
    assert "shared" not in ours.segments
    assert ours.named_data == len(theirs.named_data) > 0


def test_bytes_that_two_segments_share_are_counted_once(program, tmp_path):
    data = bytearray(program.read_bytes())
    tables = sorted(Table.root(data).tables(4), key=lambda table: table.number(1, "Q"))
    small, large = tables[-2], tables[-1]
    assert small.at(0) and small.number(1, "Q") < large.number(1, "Q")
    struct.pack_into("<Q", data, small.at(0), large.number(0, "Q"))
    (tmp_path / "shared.pte").write_bytes(data)
    before, after = pte.read(program).segments, pte.read(tmp_path / "shared.pte").segments
    assert after.pop("shared") == small.number(1, "Q")
    assert sum(before.values()) - sum(after.values()) == small.number(1, "Q")


def test_inspecting_a_pte_needs_no_torch(program):
    code = "import sys; from pathlib import Path; from mobile_export.inspect import inspect, render\n"
    code += "render(inspect(Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    assert re.search(r"aten::cumsum.out +2 +outside", done.stdout)
    assert "XnnpackBackend" in done.stdout and "get_eos_ids" in done.stdout


@pytest.mark.parametrize("keep", [0, 6, 40, 200, 0.5, 0.99])
def test_a_cut_pte_is_refused(program, tmp_path, keep):
    data = program.read_bytes()
    cut = tmp_path / "cut.pte"
    cut.write_bytes(data[: keep if keep == int(keep) else int(len(data) * keep)])
    with pytest.raises(ExportError, match="'cut.pte' is (damaged or cut short|not an ExecuTorch program)"):
        pte.read(cut)


def test_a_damaged_pte_never_crashes(program, tmp_path):
    data = program.read_bytes()
    path = tmp_path / "bad.pte"
    for at in range(0, pte.read(program).segments["program"], 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with suppress(ExportError):
            pte.read(path)


@pytest.fixture
def made(program, tmp_path):
    with bundle.create(tmp_path / "android") as draft:
        draft.path("model.pte", "program").write_bytes(program.read_bytes())
        draft.finish(make_manifest())
    return tmp_path / "android"


def test_a_bundle_is_verified_and_summed_up(made, capsys):
    report = inspect(made)
    assert report.kind == "bundle" and report.name == "android"
    assert report.manifest.model.name == "small" and report.program.constants["use_kv_cache"] is True
    assert json.loads(msgspec.json.encode(report))["program"]["methods"][0]["name"] == "forward"
    render(report)
    shown = capsys.readouterr().out
    for part in ("model.pte", "apply NFC before tokenizing", "0.00123", "XnnpackBackend", "executorch 1.4.0"):
        assert part in shown


def test_an_altered_bundle_is_refused(made):
    with (made / "model.pte").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(ExportError, match="'model.pte' was altered"):
        inspect(made)


@pytest.mark.parametrize(
    ("promised", "message"),
    [
        ({"get_max_seq_len": 128, "one": [7]}, None),
        ({"get_max_seq_len": 64}, "get_max_seq_len is 64, and the program returns 128"),
        ({"get_eos_ids": [2]}, r"get_eos_ids is \[2\], and the program returns \[2, 3\]"),
        ({"missing": 1}, "missing is 1, and the program returns None"),
    ],
)
def test_a_manifest_promises_what_the_program_returns(made, promised, message):
    manifest = make_manifest()
    io = msgspec.structs.replace(manifest.io, constant_methods=promised)
    program = (made / "model.pte").read_bytes()
    with bundle.create(made) as draft:
        draft.path("model.pte", "program").write_bytes(program)
        draft.finish(msgspec.structs.replace(manifest, io=io))
    with pytest.raises(ExportError, match=message) if message else nullcontext():
        inspect(made)


def test_safetensors_and_gguf(tmp_path, capsys):
    import gguf

    write_tensors(tmp_path / "a.safetensors", {"x": torch.rand(3, 4), "y": torch.zeros(5, dtype=torch.int8)})
    weights = inspect(tmp_path / "a.safetensors").weights
    assert (weights.tensors, weights.parameters, weights.dtypes) == (2, 17, {"F32": 1, "I8": 1})
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_context_length(64)
    writer.add_tensor("w", torch.rand(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = inspect(tmp_path / "a.gguf")
    assert (report.weights.tensors, report.weights.parameters) == (1, 128)
    assert report.weights.metadata == {"general.architecture": "qwen2", "qwen2.context_length": 64}
    render(report)
    assert "1 tensors, 128 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no file or folder"),
        ("text.txt", "cannot inspect 'text.txt'"),
        ("bad.pte", "'bad.pte' is not an ExecuTorch program"),
        ("bad.gguf", "'bad.gguf' is not a GGUF file"),
        ("bad.safetensors", "'bad.safetensors' is not a whole safetensors file"),
        ("folder", "'folder' is not a bundle"),
    ],
)
def test_other_things_are_refused_in_one_line(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    if name not in ("missing", "folder"):
        (tmp_path / name).write_bytes(b"hello, hello, hello")
    with pytest.raises(ExportError, match=message):
        inspect(Path(tmp_path / name))
