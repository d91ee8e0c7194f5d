import json
from pathlib import Path

import gguf
import pytest
from safetensors.numpy import load_file

from mobile_export.checkpoint import resolve

SANDBOX = "sandbox:{}?layers=2&hidden=64&vocab=512"
ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "llama": gguf.MODEL_ARCH.LLAMA,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(folder))
    return folder


@pytest.fixture
def sandbox(cache):
    """Resolve a two-layer model of a family."""
    return lambda family="qwen2", more="": resolve(SANDBOX.format(family) + more)


@pytest.fixture
def write_gguf(tmp_path):
    """Write a checkpoint as a GGUF with the gguf package's own writer and names; return its path."""

    def write(checkpoint, name="tiny.gguf", *, types=None, drop=(), arch=None, **metadata):
        path = tmp_path / name
        config = json.loads((checkpoint.folder / "config.json").read_text())
        writer = gguf.GGUFWriter(path, arch or config["model_type"])
        _write_sizes(writer, config, metadata)
        _write_tokenizer(writer, checkpoint.folder, metadata)
        names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
        for full, tensor in load_file(checkpoint.folder / "model.safetensors").items():
            stem, _, kind = full.rpartition(".")
            short = f"{names.get_name(stem)}.{kind}"
            if config["model_type"] == "llama" and full.endswith(("q_proj.weight", "k_proj.weight")):
                # What llama.cpp's converter does to a llama model.
                heads = config["num_attention_heads" if "q_proj" in full else "num_key_value_heads"]
                rows, columns = tensor.shape
                split = tensor.reshape(heads, 2, rows // heads // 2, columns)
                tensor = split.swapaxes(1, 2).reshape(rows, columns)
            copies = [short, "output.weight"] if "output.weight" in (types or {}) else [short]
            for copy in copies if short == "token_embd.weight" else [short]:
                if copy not in drop:
                    kind_of = (types or {}).get(copy, gguf.GGMLQuantizationType.F32)
                    writer.add_tensor(copy, gguf.quantize(tensor, kind_of), raw_dtype=kind_of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _write_sizes(writer, config, metadata):
    writer.add_block_count(metadata.get("layers", config["num_hidden_layers"]))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "rope_scaling" in metadata:
        writer.add_rope_scaling_type(gguf.RopeScalingType(metadata["rope_scaling"]))
    if "license" in metadata:
        writer.add_license(metadata["license"])


def _write_tokenizer(writer, folder: Path, metadata):
    table = json.loads((folder / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    special = {token["content"] for token in table["added_tokens"]}
    writer.add_tokenizer_model(metadata.get("model", "gpt2"))
    writer.add_tokenizer_pre(metadata.get("pre", "qwen2"))
    writer.add_token_list(sorted(vocab, key=vocab.get))
    kinds = [3 if token in special else 1 for token in sorted(vocab, key=vocab.get)]
    writer.add_token_types(kinds[: metadata.get("kinds", len(kinds))])
    writer.add_token_merges([" ".join(merge) for merge in table["model"]["merges"]])
    writer.add_eos_token_id(metadata.get("eos", vocab["<|im_end|>"]))
    writer.add_pad_token_id(vocab["<|endoftext|>"])
    writer.add_bos_token_id(vocab["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
