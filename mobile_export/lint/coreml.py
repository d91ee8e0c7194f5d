"""Rules for Core ML packages: what decides the compute unit, the least iOS and the memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mobile_export.console import human_bytes
from mobile_export.lint import Rule
from mobile_export.lint._coreml_look import Looked, look, need, values
from mobile_export.lint._coreml_sources import (
    ANE_WRITES,
    ATTENTION,
    FLEXIBLE,
    HF_KEYS,
    INT_INPUTS,
    IOS_LIMITS,
    MEMORY_LIMITS,
    PALETTES,
    STATE_32,
    TYPED,
    WIDE,
)
from mobile_export.mlpackage import constant, tensor_type

__all__ = ["RULES", "look"]

_ANE_WIDEST = 16_384
_ANE_STEP = 32
_IOS = {6: 15, 7: 16, 8: 17, 9: 18, 10: 26}
"""iOS by the format's specification version."""
_IOS_18_OPS = {
    *("read_state", "write_state", "coreml_update_state", "slice_update", "scaled_dot_product_attention"),
    *("constexpr_blockwise_shift_scale", "constexpr_lut_to_sparse", "constexpr_sparse_to_dense"),
    *("constexpr_sparse_blockwise_shift_scale",),
}
_RAM = {4: (2.1, 2.4), 6: (3.1, 4.2), 8: (3.0, 6.0)}
"""GB of RAM: GB an application was reported to get, without and with increased-memory-limit."""
_KEYS = {
    *("inputIds", "attentionMask", "causalMask", "fullAttentionMask", "slidingAttentionMask"),
    *("keyCache", "valueCache", "logits"),
}
_HELPERS = ("const", "constexpr_", "cast", "read_state", "write_state", "coreml_update_state")


def _state_widths(looked: Looked) -> Iterator[str]:
    bad = {
        name: kind for name, kind in looked.states.items() if kind.shape and (kind.shape[-1] or 1) % _ANE_STEP
    }
    if bad:
        name, kind = next(iter(bad.items()))
        yield (
            f"{len(bad)} of {len(looked.states)} states are not a multiple of {_ANE_STEP} wide, "
            f"e.g. {name} {list(kind.shape)}"
        )


def _needs(looked: Looked) -> dict[str, int]:
    """Specification version by the feature that asks for it."""
    needs: dict[str, int] = {}
    if looked.states:
        needs[f"{len(looked.states)} states"] = 9
    if len(looked.functions) > 1:
        needs[f"{len(looked.functions)} functions"] = 9
    for function in looked.functions.values():
        if found := re.fullmatch(r"CoreML(\d+)", function.opset):
            needs[f"opset {function.opset}"] = int(found.group(1)) + 1
        for op, _, kind in values(function):
            if op.type in _IOS_18_OPS:
                needs[op.type] = 9
            if re.fullmatch(r"u?int[1-6]", kind.dtype):
                needs[f"weights in {kind.dtype}"] = 9
        if any(kind.dtype == "fp16" for kind in function.inputs.values()):
            needs["fp16 inputs"] = 7
    return needs


def _least_ios(looked: Looked) -> int:
    return _IOS.get(max([6, *_needs(looked).values()]), max(_IOS.values()))


def _minimum_os(looked: Looked) -> Iterator[str]:
    needs = _needs(looked)
    highest = max([6, *needs.values()])
    because = ", ".join(name for name, version in needs.items() if version == highest)
    yield f"the package needs iOS {_least_ios(looked)} or later" + (f": {because}" if because else "")


def _version_claimed(looked: Looked) -> Iterator[str]:
    needs = {name: version for name, version in _needs(looked).items() if version > looked.version}
    if needs:
        listed = ", ".join(f"{name} ({version})" for name, version in needs.items())
        yield f"the specification version is {looked.version}, and these need more: {listed}"
    said = re.search(r"\d+", looked.manifest.runtime.minimum_version)
    if said and int(said.group()) < _least_ios(looked):
        yield (
            f"the manifest says {looked.manifest.runtime.minimum_version}, and the package needs "
            f"iOS {_least_ios(looked)}"
        )


def _flexible(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        varying = [one for one, kind in function.inputs.items() if None in kind.shape]
        if function.states and varying:
            listed = ", ".join(varying)
            yield f"function {name} has {len(function.states)} states and varying inputs: {listed}"


def _wide(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        found = {
            value: kind.shape
            for op, value, kind in values(function)
            if not op.type.startswith("const") and any((size or 0) > _ANE_WIDEST for size in kind.shape)
        }
        if found:
            value, shape = next(iter(found.items()))
            text = [size or "?" for size in shape]
            wider = f"{len(found)} tensors of function {name} are wider than {_ANE_WIDEST:,}"
            yield f"{wider}, e.g. {value} {text}"


def _five_dimensions(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        found = {
            value: kind.shape
            for op, value, kind in values(function)
            if len(kind.shape) > 4 and not op.type.startswith((*_HELPERS, "slice_"))
        }
        if found:
            value, shape = next(iter(found.items()))
            text = [size or "?" for size in shape]
            yield f"{len(found)} tensors of function {name} have more than 4 dimensions, e.g. {value} {text}"


def _fused_attention(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        if count := sum(op.type == "scaled_dot_product_attention" for op in function.ops):
            yield f"{count} scaled_dot_product_attention in function {name}"


def _palettes(looked: Looked) -> Iterator[str]:
    made = looked.manifest.tools.get("coremltools") or looked.package.metadata.get(
        "com.github.apple.coremltools.version", ""
    )
    if not made.startswith("9.0") or not looked.states:
        return
    count = 0
    for function in looked.functions.values():
        for op in function.ops:
            if op.type == "constexpr_lut_to_dense":
                indices = constant(op, "indices", function.constants)
                count += indices is not None and tensor_type(indices.type).dtype == "uint4"
    if count:
        beside = f"beside {len(looked.states)} states, made by coremltools {made}"
        yield f"{count} weights with 4-bit palettes {beside}"


def _memory(looked: Looked) -> Iterator[str]:
    weights, states, largest = need(looked)
    total = weights + states + largest
    parts = (
        f"weights {human_bytes(weights)}, states {human_bytes(states)}, largest step {human_bytes(largest)}"
    )
    fits = ", ".join(
        f"{100 * total / (low * 1e9):.0f} % of the {low} GB at {ram} GB RAM" for ram, (low, _) in _RAM.items()
    )
    yield f"at least {human_bytes(total)} ({parts}): {fits}"


def _memory_limit(looked: Looked) -> Iterator[str]:
    total = sum(need(looked))
    for ram, (low, high) in _RAM.items():
        if total > low * 1e9:
            also = "also with" if total > high * 1e9 else "without"
            limit = high if total > high * 1e9 else low
            yield (
                f"at least {human_bytes(total)} is more than the {limit} GB an application gets at "
                f"{ram} GB RAM, {also} the entitlement"
            )


def _fp32(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        found = [
            op.type
            for op, _, kind in values(function)
            if kind.dtype == "fp32" and not op.type.startswith(_HELPERS)
        ]
        if found:
            kinds = ", ".join(sorted(set(found))[:5])
            yield f"{len(found)} ops of function {name} compute in fp32: {kinds}"


def _integers(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        inputs = [one for one, kind in function.inputs.items() if kind.dtype == "int32"]
        ops = sum(
            kind.dtype == "int32" and not op.type.startswith("const") for op, _, kind in values(function)
        )
        if inputs or ops:
            yield f"function {name}: int32 inputs {', '.join(inputs) or 'none'}, {ops} ops that make int32"


def _dynamic_writes(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        writes = [op for op in function.ops if op.type == "slice_update"]
        moving = sum(constant(op, "begin", function.constants) is None for op in writes)
        if function.states and moving:
            yield f"{moving} of {len(writes)} slice updates of function {name} begin where an input says"


def _names(looked: Looked) -> Iterator[str]:
    for name, function in looked.functions.items():
        own = [*function.inputs, *function.states, *function.outputs]
        if others := [one for one in own if one not in _KEYS]:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            yield f"function {name} has {', '.join(others[:4])}{more}"


RULES = (
    Rule(
        "coreml-version",
        "error",
        _version_claimed,
        "export it again for that iOS: Core ML refuses what its format version does not know",
        IOS_LIMITS,
    ),
    Rule(
        "coreml-state-width",
        "warning",
        _state_widths,
        "pad the state's last dimension, or run with CPU and GPU only",
        STATE_32,
    ),
    Rule(
        "coreml-flexible-state",
        "warning",
        _flexible,
        "use fixed functions (prefill of a fixed chunk, decode of 1) for the Neural Engine",
        FLEXIBLE,
    ),
    Rule(
        "coreml-wide-dimension",
        "warning",
        _wide,
        "expect these on GPU or CPU; before you split the head, measure on the device: it can be slower",
        WIDE,
    ),
    Rule(
        "coreml-five-dimensions",
        "warning",
        _five_dimensions,
        "keep attention in 4 dimensions (heads repeated by concat or a reshape of the query)",
        ATTENTION,
    ),
    Rule(
        "coreml-palette-state",
        "warning",
        _palettes,
        "build it with coremltools 8.3, use int8, or run with CPU and GPU only",
        PALETTES,
    ),
    Rule(
        "coreml-fp32",
        "warning",
        _fp32,
        "export for fp16 compute: fp32 ops run on GPU and CPU",
        (TYPED,),
    ),
    Rule(
        "coreml-memory-limit",
        "warning",
        _memory_limit,
        "ask os_proc_available_memory before loading; add the entitlement, or use a smaller model or context",
        MEMORY_LIMITS,
    ),
    Rule(
        "coreml-minimum-os", "info", _minimum_os, "set the application's deployment target to it", IOS_LIMITS
    ),
    Rule(
        "coreml-memory",
        "info",
        _memory,
        "ask os_proc_available_memory before loading; what Core ML adds for its own plan is not counted",
        MEMORY_LIMITS,
    ),
    Rule(
        "coreml-fused-attention",
        "info",
        _fused_attention,
        "run the bundle's selftest.json on an iOS 26 device too, with the compute units that you ship",
        ATTENTION,
    ),
    Rule(
        "coreml-integer",
        "info",
        _integers,
        "nothing: position arithmetic is small; look at the ops' compute units in Xcode's performance report",
        INT_INPUTS,
    ),
    Rule(
        "coreml-dynamic-write",
        "info",
        _dynamic_writes,
        "try the Neural Engine on the device first; where loading fails, run with CPU and GPU only",
        ANE_WRITES,
    ),
    Rule(
        "coreml-names",
        "info",
        _names,
        "drive it with a loop of your own, which calls it by the manifest's names",
        HF_KEYS,
    ),
)
