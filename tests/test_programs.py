import os
import subprocess
import sys

import pytest
import torch

from mobile_export import dialect, programs
from mobile_export.errors import ExportError
from mobile_export.tensors import map_tensors, write_tensors
from mobile_export.types import Dims, Program, sample_inputs

DIMS = Dims(layers=1, heads=4, kv_heads=2, head_dim=8, hidden=32, vocab=64, context=16)


class Small(torch.nn.Module):
    """One attention layer of the program's signature, its head tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(DIMS.vocab, DIMS.hidden)
        self.q, self.k, self.v = (torch.nn.Linear(DIMS.hidden, width) for width in (32, 16, 16))
        self.norm = torch.nn.Parameter(torch.rand(DIMS.hidden))
        self.register_buffer("codes", torch.randint(-127, 127, (32, 32), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(32) / 100)
        self.register_buffer("shift", torch.rand(32), persistent=False)
        self.head = torch.nn.Linear(DIMS.hidden, DIMS.vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, start, caches):
        ops = torch.ops.mobile
        x = self.embed(tokens) + self.shift
        h = ops.rms_norm(x, self.norm, 1e-6)
        q, k, v = (part(h).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        caches = [ops.update_cache(cache, new, start) for cache, new in zip(caches, (k, v), strict=True)]
        mixed = ops.attention(q, *caches, start, 8**-0.5).transpose(1, 2).flatten(2)
        return self.head(x + ops.linear_int8(mixed, self.codes, self.scales, None)), *caches


def make_program():
    torch.manual_seed(0)
    assert dialect.attention is not None
    inputs, shapes = sample_inputs(DIMS)
    exported = torch.export.export(Small().eval(), inputs, dynamic_shapes=shapes, strict=False)
    return Program(exported, DIMS, ("trace",))


@pytest.fixture(scope="module")
def program():
    return make_program()


def outputs(program, length):
    torch.manual_seed(length)
    caches = tuple(torch.rand(1, 2, 16, 8) for _ in range(2))
    tokens = torch.randint(0, DIMS.vocab, (1, length))
    return program.exported.module()(tokens, torch.tensor([3]), caches)


def test_a_program_comes_back_with_equal_outputs_at_every_length(program, tmp_path):
    programs.save(program, tmp_path)
    loaded = programs.load(tmp_path)
    assert loaded.dims == DIMS and loaded.passes == ("trace",)
    for length in (1, 5, 13):
        pairs = zip(outputs(program, length), outputs(loaded, length), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
    assert [str(node) for node in loaded.exported.graph.nodes] == [
        str(node) for node in program.exported.graph.nodes
    ]
    ranges = [str(value) for value in loaded.exported.range_constraints.values()]
    assert ranges == ["VR[1, 16]"]


def test_a_tied_weight_is_stored_once_and_tied_again(program, tmp_path):
    programs.save(program, tmp_path)
    stored = map_tensors(tmp_path / programs.WEIGHTS)
    assert sum(tensor.shape == (64, 32) for tensor in stored.values()) == 1
    state = programs.load(tmp_path).exported.state_dict
    assert state["embed.weight"] is state["head.weight"]


def test_weights_of_the_checkpoint_are_not_stored_again(program, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    weights = {f"model.{name}": tensor for name, tensor in program.exported.state_dict.items()}
    weights["model.q.bias"] = weights["model.q.bias"] + 1
    write_tensors(checkpoint, weights)
    programs.save(program, tmp_path, map_tensors(checkpoint))
    assert sorted(map_tensors(tmp_path / programs.WEIGHTS)) == ["q.bias", "shift"]
    loaded = programs.load(tmp_path, map_tensors(checkpoint))
    pairs = zip(outputs(program, 5), outputs(loaded, 5), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    with pytest.raises(ExportError, match="lacks 'model"):
        programs.load(tmp_path)


def test_a_loaded_program_saves_to_the_same_bytes(program, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    programs.save(program, first)
    programs.save(programs.load(first), second)
    for name in (programs.WEIGHTS, programs.INDEX, programs.GRAPH):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_process_writes_the_same_bytes_without_paths_or_pickle(program, tmp_path):
    programs.save(program, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    code = "from pathlib import Path; import sys\nfrom test_programs import make_program\n"
    code += "from mobile_export import programs; programs.save(make_program(), Path(sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, timeout=120, env=env)
    for name in (programs.GRAPH, programs.INDEX, programs.WEIGHTS):
        assert (tmp_path / name).read_bytes() == (other / name).read_bytes(), name
    for name in (programs.GRAPH, programs.INDEX):
        assert b'.py"' not in (tmp_path / name).read_bytes()
        assert b"File " not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", [programs.GRAPH, programs.WEIGHTS, programs.INDEX])
def test_an_altered_or_missing_file_is_refused(program, tmp_path, name):
    programs.save(program, tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ExportError, match="a cached program is damaged"):
        programs.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ExportError, match="a cached program is damaged"):
        programs.load(tmp_path)


def test_nothing_is_unpickled(program, tmp_path, monkeypatch):
    programs.save(program, tmp_path)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    programs.load(tmp_path)
