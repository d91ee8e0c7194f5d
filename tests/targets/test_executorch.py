"""The `.pte` in the real ExecuTorch runtime against the quantized program, and what the file holds."""

import hashlib

import numpy as np
import pytest
import torch

from mobile_export import pte
from mobile_export.flatbuffer import Table
from mobile_export.parity import kl_divergence
from mobile_export.pte_share import HEADER
from mobile_export.recipe import ExecuTorch
from mobile_export.targets import executorch, reference

FAMILIES = ("qwen2", "qwen3", "llama")
TOKENS = [3 + 37 * index % 1000 for index in range(64)]
OUTSIDE = {
    "aten::_local_scalar_dense",
    "aten::add.out",
    "aten::arange.start_out",
    "aten::embedding.out",
    "aten::select_copy.int_out",
    "aten::sym_size.int",
    "aten::unsqueeze_copy.out",
    "llama::custom_sdpa.out",
    "llama::update_cache.out",
    "quantized_decomposed::embedding_byte.out",
}
"""What may stay outside the delegate: shapes, look-ups, the cache and attention. No arithmetic on weights."""


@pytest.fixture(scope="module", params=FAMILIES)
def lowered(request, programs_of, spec, tmp_path_factory):
    """(quantized program, `.pte`) of a family; qwen2's is the exported bundle's own."""
    quantized = programs_of(spec(request.param))[2]
    if request.param == "qwen2":
        return quantized, request.getfixturevalue("sandbox_bundle").path("program")
    out = tmp_path_factory.mktemp("pte") / "model.pte"
    executorch.lower(quantized, ExecuTorch(), {"get_eos_ids": [5, 7]}, out)
    return quantized, out


@pytest.fixture(scope="module")
def runner(lowered):
    return executorch.open(lowered[1])


@pytest.fixture(scope="module")
def expected(lowered):
    return reference.open(lowered[0]).logits(TOKENS, 0)


def kl(reference_logits, logits):
    totals = [np.logaddexp.reduce(rows.astype(np.float64), axis=1) for rows in (reference_logits, logits)]
    return kl_divergence(reference_logits, totals[0], logits, totals[1])


def cut(runner, cuts):
    runner.reset()
    parts = [runner.logits(TOKENS[at:end], at) for at, end in zip(cuts, cuts[1:], strict=False)]
    return np.concatenate(parts)


CUTS = {
    "one call": [0, 64],
    "chunks": [0, 7, 23, 24, 64],
    "token by token": list(range(65)),
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_it_says_what_the_quantized_program_says(runner, expected, cuts):
    said = cut(runner, cuts)
    assert said.shape == expected.shape and said.dtype == np.float32
    found = kl(expected, said)
    # Activations are int8 here and fp32 there: that much, and no more.
    assert 1e-7 < found.mean() < 0.01 and found.max() < 0.1
    spread = expected.max(1) - np.median(expected, axis=1)
    assert (np.abs(said - expected).max(1) < spread / 3).all()


def test_last_logits_are_the_last_row(runner):
    for length in (1, 2, 9, 64):
        runner.reset()
        whole = runner.logits(TOKENS[:length], 0)
        runner.reset()
        last = runner.last_logits(TOKENS[:length], 0)
        assert last.shape == (runner.vocab,)
        assert np.abs(last - whole[-1]).max() < 1e-4


def test_as_a_device_calls_it(runner, expected):
    """A prompt, then token by token, by the method that devices run."""
    runner.reset()
    rows = [runner.last_logits(TOKENS[:20], 0)]
    rows += [runner.last_logits(TOKENS[at : at + 1], at) for at in range(20, 64)]
    found = kl(expected[19:], np.stack(rows))
    assert found.mean() < 0.01 and found.max() < 0.1


def test_the_two_methods_may_be_mixed(runner):
    whole = cut(runner, [0, 10, 20, 30])
    runner.reset()
    first = runner.logits(TOKENS[:10], 0)
    second = runner.last_logits(TOKENS[10:20], 10)
    third = runner.logits(TOKENS[20:30], 20)
    assert kl(whole[:10], first).max() < 1e-4
    assert kl(whole[19:20], second[None]).max() < 0.02
    assert kl(whole[20:30], third).max() < 0.02


def test_a_new_sequence_does_not_hear_the_old_one(runner):
    runner.reset()
    fresh = runner.last_logits(TOKENS[:5], 0)
    runner.last_logits(TOKENS[5:64], 5)
    runner.reset()
    assert np.array_equal(runner.last_logits(TOKENS[:5], 0), fresh)
    runner.last_logits([900], 5)
    assert np.array_equal(runner.last_logits(TOKENS[:5], 0), fresh)  # over the old one, no reset
    other = runner.last_logits(TOKENS[5:6], 5)
    runner.last_logits([900, 901], 0)
    assert not np.allclose(runner.last_logits(TOKENS[2:6], 2), other, atol=1e-3), "history counts"


def test_what_the_stock_runner_asks(lowered):
    constants = pte.read(lowered[1]).constants
    assert constants.pop("get_eos_ids") in ([5, 7], [1023, 1021])
    constants.pop("get_bos_id", None)
    assert constants == {
        "get_max_seq_len": 64,
        "get_max_context_len": 64,
        "get_vocab_size": 1024,
        "get_n_layers": 2,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def test_one_delegate_spans_from_attention_to_attention(lowered):
    forward, every = pte.read(lowered[1]).methods
    assert (forward.name, every.name) == ("forward", "forward_all")
    for method in (forward, every):
        assert method.delegates == {"XnnpackBackend": 2 + 2}
        assert method.operators.keys() <= OUTSIDE
        assert method.operators["llama::custom_sdpa.out"] == 2
        assert method.operators["llama::update_cache.out"] == 4
        assert method.inputs == [pte.Value("int64", [1, 64], True), pte.Value("int64", [1])]
    assert forward.outputs == [pte.Value("fp32", [1, 1, 1024])]
    assert every.outputs == [pte.Value("fp32", [1, 64, 1024], True)]


def named_data(data):
    """(blobs by name, their places in the file, the constants' segment)."""
    base, program = HEADER.unpack_from(data, 8)[3], Table.root(data)
    spans = [(base + table.number(0, "Q"), table.number(1, "Q")) for table in program.tables(4)]
    places = {table.text(0): spans[table.number(1, "I")] for table in program.tables(7)}
    blobs = {name: data[at : at + size] for name, (at, size) in places.items()}
    return blobs, places, spans[program.table(5).number(0, "I")]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def raw(tensor):
    return tensor.contiguous().numpy().tobytes()


def test_it_holds_the_quantized_programs_codes_bit_for_bit(lowered):
    quantized, path = lowered
    blobs, _, _ = named_data(path.read_bytes())
    found = {sha(blob) for blob in blobs.values()}
    state = quantized.exported.state_dict
    codes = [name for name in state if name.endswith("_codes")]
    assert len(codes) == 15
    for name in codes:
        assert sha(raw(state[name])) in found, name
        assert sha(raw(state[name.replace("_codes", "_scales")])) in found, name


def test_tied_codes_stand_once_in_the_file(lowered):
    quantized, path = lowered
    data = path.read_bytes()
    head = next(
        raw(tensor)
        for tensor in quantized.exported.state_dict.values()
        if tuple(tensor.shape) == (1024, 64) and tensor.dtype == torch.int8
    )
    assert data.count(head) == 1
    blobs, places, (start, size) = named_data(data)
    (name,) = (name for name, blob in blobs.items() if blob == head)
    at, length = places[name]
    assert start <= at and at + length <= start + size, "it points into the constants"
    assert pte.read(path).segments["shared"] == 1024 * 64


def test_an_untied_head_and_a_text_longer_than_one_answer(programs_of, spec, tmp_path):
    """`forward_all` answers at most CHUNK positions a call: a text longer than that is more than one."""
    context = executorch.CHUNK + 40
    quantized = programs_of(spec(more="&tied=0"), context)[2]
    path = tmp_path / "model.pte"
    executorch.lower(quantized, ExecuTorch(), {}, path)
    data, summary = path.read_bytes(), pte.read(path)
    large = [raw(tensor) for tensor in quantized.exported.state_dict.values() if tensor.shape[0] == 1024]
    assert [data.count(blob) for blob in large if len(blob) == 1024 * 64] == [1, 1]
    assert "shared" not in summary.segments
    assert summary.methods[1].outputs[0].shape == [1, executorch.CHUNK, 1024]
    tokens = [3 + 37 * index % 1000 for index in range(context)]
    expected = reference.open(quantized).logits(tokens, 0)
    found = kl(expected, executorch.open(path).logits(tokens, 0))
    assert found.mean() < 0.01 and found.max() < 0.1


def test_a_context_of_one_and_no_second_method(programs_of, spec, tmp_path):
    quantized = programs_of(spec(), 1)[2]
    path = tmp_path / "model.pte"
    executorch.lower(quantized, ExecuTorch(all_logits=False), {}, path)
    assert [method.name for method in pte.read(path).methods] == ["forward"]
    said = executorch.open(path).last_logits([9], 0)
    assert kl(reference.open(quantized).logits([9], 0), said[None]).max() < 0.1


def test_threads_do_not_change_what_it_says(lowered):
    one = executorch.open(lowered[1], threads=1).logits(TOKENS, 0)
    two = executorch.open(lowered[1], threads=2).logits(TOKENS, 0)
    assert kl(one, two).max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "bytes_each", "sdpa"), [("fp16", 2, "custom_sdpa"), ("int8", 1, "custom_quantized_sdpa")]
)
def test_a_smaller_kv_cache_says_nearly_the_same(
    programs_of, spec, sandbox_bundle, tmp_path, kind, bytes_each, sdpa
):
    quantized = programs_of(spec())[2]
    out = tmp_path / "model.pte"
    executorch.lower(quantized, ExecuTorch(kv_cache=kind), {"get_eos_ids": [5]}, out)
    exact = executorch.open(sandbox_bundle.path("program"))
    small = executorch.open(out)
    assert 0 < kl(exact.logits(TOKENS, 0), small.logits(TOKENS, 0)).mean() < 0.01
    whole = small.logits(TOKENS, 0)
    assert kl(whole, cut(small, CUTS["chunks"])).max() < 0.1
    method = next(method for method in pte.read(out).methods if method.name == "forward")
    assert method.operators[f"llama::{sdpa}.out"] == quantized.dims.layers
    dims = quantized.dims
    saved = 2 * dims.layers * dims.kv_heads * dims.context * dims.head_dim * (4 - bytes_each)
    planned = [
        next(method for method in pte.read(path).methods if method.name == "forward").planned_bytes
        for path in (sandbox_bundle.path("program"), out)
    ]
    assert planned[0] - planned[1] > saved / 2, "the state is what became smaller"
