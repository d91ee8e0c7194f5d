"""What stands beside `model.onnx` for those who ship it: a reduced runtime's operators, onnxruntime-genai.

Nothing here loads the runtime, and nothing copies the weights: the data file is the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.targets.onnx_io import CACHES, LOGITS, MASK, PAST, PRESENT, READ, TOKENS
from mobile_export.targets.onnx_weights import METADATA

if TYPE_CHECKING:
    from mobile_export.types import Dims

OPERATORS, GENAI_CONFIG, GENAI_MODEL = "required_operators.config", "genai_config.json", "model_genai.onnx"
"""Names in a bundle."""


def required_operators(model: Path) -> str:
    """The operators of a `.onnx` for `build.py --include_ops_by_config`: lines of `domain;opset;op,op`.

    The opset is that in which the operator got its present form, by which the runtime finds a kernel.
    Stock ONNX Runtime 1.32 runs these operators as they stand: no graph optimization level replaces
    one or adds one, which a test holds against the runtime.
    """
    import onnx

    proto = onnx.load(model, load_external_data=False)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    found: dict[tuple[str, int], set[str]] = {}
    for node in proto.graph.node:
        version = opsets[node.domain]
        if not node.domain:
            version = onnx.defs.get_schema(node.op_type, version).since_version
        found.setdefault((node.domain or "ai.onnx", version), set()).add(node.op_type)
    lines = [f"{domain};{since};{','.join(sorted(ops))}" for (domain, since), ops in sorted(found.items())]
    return "\n".join(lines) + "\n"


def cpu_features(accuracy_level: int) -> list[str]:
    """What the products ask of a CPU, as `architecture:flag`, the flag as Linux's /proc/cpuinfo names it.

    Level 4 ended with SIGILL on emulated Cortex-A53 and A72 and ran on A76; level 0 ran on all three.
    """
    return ["arm64:asimddp"] if accuracy_level == 4 else []


def genai_model(model: Path, out: Path) -> None:
    """Write the `.onnx` that onnxruntime-genai loads, beside `model`, over the same data file.

    It makes room for one position's logits only where the model's output is declared so, and knows no
    input with a default: here the read position is a constant, and logits are fp32 [1, 1, vocab].
    """
    import onnx

    assert model.parent == out.parent, "the data file is found beside the model"
    proto = onnx.load(model, load_external_data=False)
    graph = proto.graph
    graph.input.remove(next(value for value in graph.input if value.name == READ))
    logits = next(value for value in graph.output if value.name == LOGITS)
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    proto.metadata_props.remove(next(entry for entry in proto.metadata_props if entry.key == METADATA))
    out.write_bytes(proto.SerializeToString(deterministic=True))


def genai_config(
    dims: Dims,
    *,
    family: str,
    eos_ids: Sequence[int],
    bos_id: int | None,
    pad_id: int | None,
    chunk: int,
    filename: str = GENAI_MODEL,
) -> bytes:
    """onnxruntime-genai's genai_config.json: greedy, one KV cache for past and present, prompts in chunks.

    `family` is `qwen2`, `qwen3` or `llama`, which are its names too. Without `pad_id` the first of
    `eos_ids` pads; the model reads only the attention mask's length.
    Fields: https://onnxruntime.ai/docs/genai/reference/config.html.
    """
    model: dict[str, Any] = {
        "type": family,
        "vocab_size": dims.vocab,
        "context_length": dims.context,
        "eos_token_id": list(eos_ids),
        "pad_token_id": eos_ids[0] if pad_id is None else pad_id,
        "decoder": {
            "filename": filename,
            "session_options": {"provider_options": []},
            "hidden_size": dims.hidden,
            "head_size": dims.head_dim,
            "num_attention_heads": dims.heads,
            "num_key_value_heads": dims.kv_heads,
            "num_hidden_layers": dims.layers,
            "inputs": {"input_ids": TOKENS, "attention_mask": MASK, **_caches("past", PAST)},
            "outputs": {"logits": LOGITS, **_caches("present", PRESENT)},
        },
    }
    if bos_id is not None:
        model["bos_token_id"] = bos_id
    search = {
        "do_sample": False,
        "num_beams": 1,
        "top_k": 1,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "max_length": dims.context,
        "chunk_size": chunk,
        "past_present_share_buffer": True,
    }
    return (json.dumps({"model": model, "search": search}, indent=2, sort_keys=True) + "\n").encode()


def _caches(which: str, prefix: str) -> dict[str, str]:
    return {f"{which}_{kind}_names": f"{prefix}%d.{kind}" for kind in CACHES}
