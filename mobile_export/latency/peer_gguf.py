"""A checkpoint as a Q8_0 GGUF, named and typed as llama.cpp's own converter does, less the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.checkpoint import cache
from mobile_export.checkpoint.folder import read_json
from mobile_export.types import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

VERSION = 1
"""Raise it when the same checkpoint gives other bytes."""
_BLOCK = 32
"""Values that share a scale in Q8_0."""


def q8_0(checkpoint: Checkpoint) -> Path:
    """The cached GGUF of a checkpoint's fp32 weights, written when it is not there yet.

    Matrices are Q8_0 (int8 with an fp16 scale for each 32 values of a row), vectors fp32. A tied
    head is stored once, as the embedding. The bench feeds token ids, so there is no tokenizer.
    """
    path = cache.root() / "peers" / "gguf" / f"{checkpoint.digest[:16]}-q8_0-v{VERSION}.gguf"
    with cache.lock(path.name):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            write(checkpoint, temporary)
            temporary.replace(path)
    return path


def write(checkpoint: Checkpoint, out: Path) -> None:
    """Write the GGUF of a qwen2, qwen3 or llama checkpoint to `out`."""
    import gguf

    config = read_json(checkpoint.folder, "config.json")
    writer = gguf.GGUFWriter(out, checkpoint.family, use_temp_file=True)
    try:
        _write_sizes(writer, config)
        for name, values, kind in _tensors(checkpoint, config):
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _write_sizes(writer: GGUFWriter, config: dict[str, Any]) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _rope_theta(config: dict[str, Any]) -> float:
    """transformers 5 writes it into `rope_parameters`."""
    return float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])


def _tensors(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray, GGMLQuantizationType]]:
    """Name, data and type of each tensor, in the order of the checkpoint's names."""
    import gguf
    import numpy as np

    kinds, names = gguf.GGMLQuantizationType, _names(checkpoint.family, config["num_hidden_layers"])
    for name, values in _fp32(checkpoint.folder):
        stem, _, part = name.rpartition(".")
        if stem == "lm_head" and config.get("tie_word_embeddings"):
            continue
        if checkpoint.family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            values = _interleave(values, heads)
        kind = kinds.F32
        if values.ndim == 2:
            kind = kinds.Q8_0 if values.shape[1] % _BLOCK == 0 else kinds.F16
        yield f"{names.get_name(stem)}.{part}", gguf.quantize(np.ascontiguousarray(values), kind), kind


def _names(family: str, layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], layers)


def _fp32(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors one at a time, sorted by name."""
    import torch
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), path)
    for name, path in sorted(files.items()):
        with safe_open(path, framework="pt") as opened:
            yield name, opened.get_tensor(name).to(torch.float32).numpy()


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp wants a llama's rotary halves interleaved in each head's rows."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
