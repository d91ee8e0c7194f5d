"""What the three families share: config.json and generation_config.json, as their authors publish them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The numbers that make a model of a family."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_theta: float
    eps: float
    tied: bool


def config(shape: Shape, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json of a model with this shape."""
    table: dict[str, Any] = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[
                shape.family
            ]
        ],
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": "float32",
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "model_type": shape.family,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.family != "qwen2":
        table |= {"attention_bias": False, "head_dim": shape.head_dim}
    if shape.family == "llama":
        table["mlp_bias"] = False
    else:
        table |= {"max_window_layers": shape.layers, "sliding_window": None, "use_sliding_window": False}
    return table


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in model.safetensors; a tied head is not stored twice."""
    hidden, head = shape.hidden, shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        sizes = {"q": shape.heads * head, "k": shape.kv_heads * head, "v": shape.kv_heads * head}
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        for part, size in sizes.items():
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = (size, hidden)
            if shape.family == "qwen2":
                tensors[f"{prefix}self_attn.{part}_proj.bias"] = (size,)
        if shape.family == "qwen3":
            tensors[prefix + "self_attn.q_norm.weight"] = (head,)
            tensors[prefix + "self_attn.k_norm.weight"] = (head,)
        tensors[prefix + "self_attn.o_proj.weight"] = (hidden, shape.heads * head)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        tensors[prefix + "mlp.gate_proj.weight"] = (shape.intermediate, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = (shape.intermediate, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = (hidden, shape.intermediate)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, hidden)
    return tensors


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Readable JSON with sorted keys: the same table is the same bytes."""
    path.write_text(json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def write_configs(folder: Path, shape: Shape, *, bos: int | None, eos: list[int], pad: int | None) -> None:
    """config.json and generation_config.json; `eos` are the ids that end an answer, the main one first."""
    write_json(folder / "config.json", config(shape, bos, eos[0] if eos else None))
    table = {"bos_token_id": bos, "do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
    write_json(folder / "generation_config.json", table)
