"""The tensors of a GGUF under transformers' names, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mobile_export.checkpoint.families import Shape
from mobile_export.checkpoint.gguf_file import GET_AGAIN, USE_COMMON_TYPE
from mobile_export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SAME = 0.3
"""Relative distance below which head and embedding are one matrix quantised twice. Two roundings
of one matrix differ by 0.04 (8 and 5 bits) to 0.25 (2 bits); two trained matrices by more than 1."""


def tied(reader: GGUFReader) -> bool:
    """Whether the head is the embedding: not stored at all, or stored again in another quantization."""
    import numpy as np

    found = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" not in found:
        return True
    head, embedding = found["output.weight"], found["token_embd.weight"]
    if head.shape.tolist() != embedding.shape.tolist():
        return False
    step = max(1, len(head.data) // 1024)
    first, second = _fp32(head, step), _fp32(embedding, step)
    return bool(np.linalg.norm(first - second) < _SAME * np.linalg.norm(second))


def tensors(
    reader: GGUFReader, shape: Shape, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `shapes` in their order, dequantised to fp32 one at a time.

    Raises ExportError for a tensor that is missing, misshapen, left over or not finite.
    """
    import numpy as np

    found = {tensor.name: tensor for tensor in reader.tensors}
    names = {name: _gguf_name(name) for name in shapes}
    if shape.tied and "output.weight" in found:
        names["model.embed_tokens.weight"] = _finer(found["output.weight"], found["token_embd.weight"])
    _compare(set(names.values()), found)
    for name, size in shapes.items():
        tensor = found[names[name]]
        if tuple(reversed(tensor.shape.tolist())) != size:
            raise ExportError(f"GGUF tensor '{tensor.name}' has the wrong shape", GET_AGAIN)
        values = _fp32(tensor)
        if not np.isfinite(values).all():
            raise ExportError(f"GGUF tensor '{tensor.name}' is not finite", GET_AGAIN)
        if shape.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, shape.head_dim)
        yield name, np.ascontiguousarray(values)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def _finer(first: ReaderTensor, second: ReaderTensor) -> str:
    return first.name if first.n_bytes >= second.n_bytes else second.name


def _compare(wanted: set[str], found: dict[str, ReaderTensor]) -> None:
    hint = "use a plain model of the qwen2, qwen3 or llama family"
    if missing := sorted(wanted - found.keys()):
        raise ExportError(f"the GGUF lacks {len(missing)} tensors, e.g. {missing[0]}", hint)
    known = wanted | {"output.weight", "token_embd.weight"}
    if extra := sorted(found.keys() - known):
        raise ExportError(f"the GGUF has {len(extra)} tensors we do not know, e.g. {extra[0]}", hint)


def _fp32(tensor: ReaderTensor, step: int = 1) -> np.ndarray:
    """Every `step`-th row of a tensor, dequantised."""
    import gguf

    try:
        return gguf.dequantize(tensor.data[::step], tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise ExportError(f"GGUF tensors of type {kind} cannot be read", USE_COMMON_TYPE) from None


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Llama GGUFs interleave each head's two rotary halves; transformers keeps them one after the other."""
    rows, columns = weight.shape
    heads = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return heads.swapaxes(1, 2).reshape(rows, columns)
