"""Rules for ONNX bundles: what the runtime, the CPU, the store and the application must know."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from mobile_export.console import human_bytes
from mobile_export.lint import Rule
from mobile_export.lint._coreml_sources import MEMORY_LIMITS
from mobile_export.lint._onnx_look import PAST, Looked, look
from mobile_export.lint._onnx_sources import (
    CONTRACT,
    CONTRIB,
    DATA_FILE,
    DOT_PRODUCT,
    GENAI,
    MEMORY,
    PLAY,
    PROVIDERS,
    REDUCED,
    STOCK,
    TELEMETRY,
    VERSIONS,
)

__all__ = ["RULES", "look"]

_DOT_PRODUCT = "arm64:asimddp"
_REPORTS = Version("1.29")
"""The first ONNX Runtime that reports from phones."""
_SMALL_PHONE = 2_100_000_000
"""Bytes that an application was reported to get on an iPhone with 4 GB."""
_BASE_MODULE = 200_000_000
_CPU_ONLY = [
    f"com.microsoft:{name}" for name in ("MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized")
]


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


def _runtime_needs(looked: Looked) -> dict[str, str]:
    """Version of ONNX Runtime by the feature that asks for it."""
    model, needs = looked.model, {}
    if model.ir_version >= 11:
        needs[f"IR version {model.ir_version}"] = "1.23"
    if model.opsets.get("ai.onnx", 0) >= 23:
        needs[f"opset {model.opsets['ai.onnx']}"] = "1.23"
    lookups = looked.attributes.get("com.microsoft:GatherBlockQuantized", [])
    if any(lookup.get("bits") == 8 for lookup in lookups):
        needs["an int8 lookup"] = "1.23"
    if "com.microsoft:GroupQueryAttention" in model.operators and any(
        cache.dtype == "fp16" for cache in looked.caches
    ):
        needs["an fp16 KV cache"] = "1.32"
    return needs


def _runtime_version(looked: Looked) -> Iterator[str]:
    promised = looked.manifest.runtime.minimum_version
    late = {
        name: least for name, least in _runtime_needs(looked).items() if _version(promised) < _version(least)
    }
    if late:
        listed = ", ".join(f"{name} ({least})" for name, least in late.items())
        yield f"the manifest says ONNX Runtime {promised} or later, and the model has {listed}"


def _contract(looked: Looked) -> Iterator[str]:
    methods = looked.manifest.io.methods
    if len(methods) != 1:
        yield f"the manifest has {len(methods)} methods, and an ONNX model is one"
        return
    for word, said, held in (
        ("inputs", methods[0].inputs, looked.model.inputs),
        ("outputs", methods[0].outputs, looked.model.outputs),
    ):
        ours, theirs = ({(one.name, one.dtype) for one in values} for values in (said, held))
        if ours != theirs:
            name, dtype = sorted(ours ^ theirs)[0]
            yield f"the manifest's {word} are not the model's: {name} {dtype}"


def _cpu_features(looked: Looked) -> Iterator[str]:
    said = _DOT_PRODUCT in looked.manifest.runtime.cpu_features
    if looked.int8_products and not said:
        products = f"{looked.int8_products} products take int8 activations"
        yield f"{products}, and the manifest does not say {_DOT_PRODUCT}"


def _genai(looked: Looked) -> Iterator[str]:
    if looked.genai is None:
        return
    if looked.genai_model is None:
        yield f"genai_config.json names '{looked.genai.filename}', which the bundle does not have"
        return
    name = looked.genai.outputs.get("logits", "logits")
    logits = next((one for one in looked.genai_model.outputs if one.name == name), None)
    if logits is None or len(logits.shape) != 3 or logits.shape[1] != 1:
        shape = logits.shape if logits else "missing"
        yield f"onnxruntime-genai needs logits declared [1, 1, vocabulary], and they are {shape}"


def _operator_list(looked: Looked) -> Iterator[str]:
    if looked.listed is None:
        return
    missing = [
        f"{domain};{opset};{name}"
        for (domain, opset), names in looked.needed.items()
        for name in sorted(names - looked.listed.get((domain, opset), set()))
    ]
    if missing:
        yield f"required_operators.config lacks {', '.join(missing)}"


def _dot_product(looked: Looked) -> Iterator[str]:
    if looked.int8_products:
        count = len(looked.products)
        yield f"{looked.int8_products} of {count} products take int8 activations (accuracy_level 4)"


def _foreign(looked: Looked) -> Iterator[str]:
    names = [name for name in looked.model.operators if ":" in name and not name.startswith("com.microsoft:")]
    if names:
        yield f"no stock package holds {', '.join(names)}"


def _context_memory(looked: Looked) -> Iterator[str]:
    if looked.cache_bytes > looked.weight_bytes:
        yield (
            f"the KV cache takes {human_bytes(looked.cache_bytes)} for a context of "
            f"{looked.manifest.io.context}, more than the weights, {human_bytes(looked.weight_bytes)}"
        )


def _need(looked: Looked) -> int:
    return looked.weight_bytes + looked.cache_bytes + 4 * looked.manifest.io.vocab


def _memory_limit(looked: Looked) -> Iterator[str]:
    if _need(looked) > _SMALL_PHONE:
        yield f"weights and caches take {human_bytes(_need(looked))}; a phone of 4 GB gives about 2.1"


def _memory(looked: Looked) -> Iterator[str]:
    kind, context = looked.manifest.io.kv_cache, looked.manifest.io.context
    half = f", in fp16 {human_bytes(looked.cache_bytes // 2)}" if kind == "fp32" else ""
    yield (
        f"weights {human_bytes(looked.weight_bytes)}, a KV cache of {context} positions "
        f"{human_bytes(looked.cache_bytes)} in {kind}{half}; together {human_bytes(_need(looked))}"
    )


def _buffers(looked: Looked) -> Iterator[str]:
    if looked.caches:
        yield (
            f"{len(looked.caches)} caches {PAST}* go in and come out as present.*: bound to other buffers, "
            f"up to {human_bytes(looked.cache_bytes)} are copied a call"
        )


def _data_file(looked: Looked) -> Iterator[str]:
    for name, size in looked.model.data_files.items():
        yield f"{name} ({human_bytes(size)}) is found beside the model, by its name"


def _play(looked: Looked) -> Iterator[str]:
    size = sum(looked.model.data_files.values())
    if size > _BASE_MODULE:
        yield f"{human_bytes(size)} of weights; Google Play takes 200 MB in a base module"


def _telemetry(looked: Looked) -> Iterator[str]:
    made = [looked.manifest.runtime.minimum_version, looked.manifest.tools.get("onnxruntime", "0")]
    newest = max(map(_version, made))
    if newest >= _REPORTS:
        yield f"proven with ONNX Runtime {newest}: from 1.29 on its stock packages report to their maker"


def _operators(looked: Looked) -> Iterator[str]:
    own = sum(name.startswith("com.microsoft:") for name in looked.model.operators)
    opsets = ", ".join(f"{domain} {version}" for domain, version in looked.model.opsets.items())
    yield f"{len(looked.model.operators)} kinds of operators, {own} of them contrib; opsets {opsets}"


def _providers(looked: Looked) -> Iterator[str]:
    found = [f"{looked.model.operators[name]} {name}" for name in _CPU_ONLY if name in looked.model.operators]
    if found:
        yield f"neither CoreML nor NNAPI takes {', '.join(found)}"


RULES = (
    Rule(
        "onnx-runtime-version",
        "error",
        _runtime_version,
        "link a later ONNX Runtime, and export it again so that the manifest says so",
        VERSIONS,
    ),
    Rule("onnx-contract", "error", _contract, "export it again", CONTRACT),
    Rule(
        "onnx-cpu-features",
        "error",
        _cpu_features,
        "export it again: applications look there before they load it",
        DOT_PRODUCT,
    ),
    Rule("onnx-genai", "error", _genai, "export it again, or remove genai_config.json", GENAI),
    Rule(
        "onnx-operator-list",
        "error",
        _operator_list,
        "export it again: a runtime built from this list does not load the model",
        (REDUCED,),
    ),
    Rule(
        "onnx-dot-product",
        "warning",
        _dot_product,
        "look for asimddp in the CPU's features before loading; for others export with "
        "onnx.accuracy_level = 0 (same codes)",
        DOT_PRODUCT,
    ),
    Rule(
        "onnx-foreign-operators",
        "warning",
        _foreign,
        "register a library of your own that holds them, or export without them",
        (CONTRIB, STOCK),
    ),
    Rule(
        "onnx-context-memory",
        "warning",
        _context_memory,
        'export with a smaller --context, or with onnx.kv_cache = "fp16"',
        (CONTRIB,),
    ),
    Rule(
        "onnx-memory-limit",
        "warning",
        _memory_limit,
        "ask os_proc_available_memory (iOS) or ActivityManager.MemoryInfo (Android) before loading; use a "
        "smaller model or context",
        MEMORY_LIMITS,
    ),
    Rule(
        "onnx-memory",
        "info",
        _memory,
        "plan with it: what a call of many tokens needs beside comes on top, so keep calls to 128 tokens",
        (MEMORY,),
    ),
    Rule(
        "onnx-cache-buffers",
        "info",
        _buffers,
        "bind each past and its present to one buffer of the whole context (IoBinding, or the same OrtValue)",
        (CONTRIB,),
    ),
    Rule(
        "onnx-data-file",
        "info",
        _data_file,
        "load by path from a folder that holds both; an Android asset has no path: copy both to the files "
        "directory first, and store assets uncompressed",
        DATA_FILE,
    ),
    Rule(
        "onnx-play-size",
        "info",
        _play,
        "deliver the bundle as an asset pack, or download it",
        PLAY,
    ),
    Rule(
        "onnx-telemetry",
        "info",
        _telemetry,
        "set ORT_DISABLE_TELEMETRY=1 in the process's environment before the library loads, or build with "
        "--no_telemetry; else tell your users",
        TELEMETRY,
    ),
    Rule(
        "onnx-operators",
        "info",
        _operators,
        "link onnxruntime-android or the pod onnxruntime-c as they are, or build a reduced one with "
        "--include_ops_by_config required_operators.config",
        (STOCK, REDUCED, CONTRIB),
    ),
    Rule(
        "onnx-providers",
        "info",
        _providers,
        "run with the CPU provider alone: others would split the graph around these",
        PROVIDERS,
    ),
)
