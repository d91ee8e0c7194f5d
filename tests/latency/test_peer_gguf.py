"""The peer's GGUF: the checkpoint's own tensors, rounded to Q8_0 and nothing else."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from mobile_export.checkpoint import resolve
from mobile_export.checkpoint.families import Shape
from mobile_export.checkpoint.gguf_tensors import tensors
from mobile_export.latency import bench, peer, peer_gguf
from mobile_export.latency.workers import RemoteRunner, Worker

FAMILIES = ("qwen2", "qwen3", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_there_in_8_bits(spec, family, tmp_path):
    checkpoint = resolve(spec(family))
    peer_gguf.write(checkpoint, tmp_path / "peer.gguf")
    reader = gguf.GGUFReader(tmp_path / "peer.gguf")
    wanted = load_file(checkpoint.folder / "model.safetensors")
    shapes = {name: value.shape for name, value in wanted.items()}
    found = dict(tensors(reader, _shape(checkpoint, family), shapes))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.ndim == 1:
            assert (found[name] == value).all(), name
        else:
            blocks, error = value.reshape(-1, 32), (found[name] - value).reshape(-1, 32)
            # Half a step, and the rounding of the scale to fp16 at the largest code.
            step = np.abs(blocks).max(axis=1, keepdims=True) / 127
            assert (np.abs(error) <= step * (0.5 + 127 * 2**-11) + 1e-8).all(), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_it_is_written_once(spec):
    checkpoint = resolve(spec())
    path = peer_gguf.q8_0(checkpoint)
    first = path.stat().st_mtime_ns, path.read_bytes()
    assert peer_gguf.q8_0(checkpoint) == path and (path.stat().st_mtime_ns, path.read_bytes()) == first
    path.unlink()
    assert peer_gguf.q8_0(checkpoint).read_bytes() == first[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peer_says_what_the_source_says(spec, family, peer_python):
    if peer_python is None:
        pytest.skip("llama.cpp is not installed: ci/bench-peer.sh")
    checkpoint = resolve(spec(family))
    for entry in peer.contenders(checkpoint, 256, peer_python):
        with Worker(bench.wide(entry)) as worker:
            runner = RemoteRunner(worker, worker.open(1))
            quality = bench._quality(entry.contender.name, runner, bench._golden(checkpoint, 256))
        assert quality.kl_mean < 0.01 and quality.positions > 100


def _shape(checkpoint, family):
    config = checkpoint.model().config
    return Shape(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads if family != "qwen3" else config.head_dim,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        rope_theta=1e4,
        eps=1e-6,
        tied=config.tie_word_embeddings,
    )
