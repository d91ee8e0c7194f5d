"""What goes into the ONNX model and comes out, by the names that onnxruntime-genai uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_export.targets.onnx_file import ModelFile

if TYPE_CHECKING:
    from mobile_export.recipe import ONNX as Options
    from mobile_export.types import Dims

TOKENS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST, PRESENT = "past_key_values.", "present."
CACHES = ("key", "value")
READ = "positions"
"""Which of the tokens' positions logits are wanted for. It has a default: the last one."""
LENGTHS = ("last_position", "total_length")
"""int32 [1] and scalar: the last token's position in the cache, and positions known after this call."""


def add_inputs(file: ModelFile, dims: Dims, options: Options) -> None:
    """Tokens [1, S], a mask of ones [1, start + S], caches, positions; and the lengths attention needs."""
    from onnx import TensorProto

    file.input(TOKENS, TensorProto.INT64, [1, "length"])
    file.input(MASK, TensorProto.INT64, [1, "total"])
    for name in cache_names(dims, PAST):
        file.input(name, _cache_type(options), [1, dims.kv_heads, "past", dims.head_dim])
    file.input(READ, TensorProto.INT64, ["read"])
    file.constant(READ, [-1], "int64")
    last, total = LENGTHS
    file.call("Shape", [MASK], "mask_length", start=1, end=2)
    file.call("Cast", ["mask_length"], "mask_length_int32", to=TensorProto.INT32)
    file.call("Squeeze", ["mask_length_int32"], total)
    file.call("Sub", ["mask_length_int32", file.constant("one", [1], "int32")], last)


def add_outputs(file: ModelFile, dims: Dims, options: Options) -> None:
    """Logits fp32 [1, positions, vocab], and the caches with what this call added."""
    from onnx import TensorProto

    file.output(LOGITS, TensorProto.FLOAT, [1, "read", dims.vocab])
    for name in cache_names(dims, PRESENT):
        file.output(name, _cache_type(options), [1, dims.kv_heads, "present", dims.head_dim])


def cache_names(dims: Dims, prefix: str) -> list[str]:
    """Of every layer, in order."""
    return [f"{prefix}{layer}.{kind}" for layer in range(dims.layers) for kind in CACHES]


def _cache_type(options: Options) -> int:
    from onnx import TensorProto

    return TensorProto.FLOAT16 if options.kv_cache == "fp16" else TensorProto.FLOAT
