"""Rules for ExecuTorch programs: what an application must link, hold in memory, and do to text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from mobile_export import pte
from mobile_export.bundle import Bundle
from mobile_export.console import human_bytes
from mobile_export.lint import Rule, Source
from mobile_export.manifest import Manifest
from mobile_export.pte import PteMethod, PteSummary

_EXPECTED = {
    "llama::update_cache": "cache",
    "llama::custom_sdpa": "attention",
    "llama::custom_quantized_sdpa": "attention",
    "quantized_decomposed::choose_qparams_per_token_asymmetric": "cache",
    "quantized_decomposed::quantize_per_token": "cache",
    "aten::_to_copy": "cache",
    "quantized_decomposed::embedding_byte": "lookup",
    "aten::embedding": "lookup",
}
_ARITHMETIC = {
    *(
        "linear",
        "addmm",
        "mm",
        "bmm",
        "matmul",
        "convolution",
        "_softmax",
        "mul",
        "div",
        "sub",
        "pow",
        "mean",
    ),
    *("rsqrt", "sigmoid", "silu", "gelu", "native_layer_norm", "rms_norm", "cat", "sum", "cumsum", "amax"),
}
_QUANTIZERS = ("quantized_decomposed::quantize", "quantized_decomposed::dequantize")
_LIBRARIES = {
    "aten": "kernels_optimized",
    "llama": "kernels_llm",
    "quantized_decomposed": "kernels_quantized",
    "torchao": "kernels_torchao",
    "XnnpackBackend": "backend_xnnpack",
    "CoreMLBackend": "backend_coreml",
    "MPSBackend": "backend_mps",
}
_IOS = Source(
    "ExecuTorch, Using ExecuTorch on iOS",
    "https://docs.pytorch.org/executorch/stable/using-executorch-ios.html",
)
_ANDROID = Source(
    "ExecuTorch, Using ExecuTorch on Android",
    "https://docs.pytorch.org/executorch/stable/using-executorch-android.html",
)
_DELEGATION = Source(
    "ExecuTorch, Debugging Delegation",
    "https://docs.pytorch.org/executorch/stable/debug-backend-delegate.html",
)
_MEMORY = Source(
    "ExecuTorch, Memory Planning",
    "https://docs.pytorch.org/executorch/stable/compiler-memory-planning.html",
)


@dataclass(frozen=True)
class Looked:
    """What the checks read."""

    manifest: Manifest
    program: PteSummary
    program_bytes: int
    normalizer: bool
    """Whether the tokenizer file for the device's runner normalizes text itself."""

    @property
    def forward(self) -> PteMethod | None:
        """The method that devices run."""
        return next((method for method in self.program.methods if method.name == "forward"), None)


def look(bundle: Bundle) -> Looked:
    """Read the program's flatbuffer and the runner's tokenizer."""
    program = bundle.path("program")
    tokenizer = json.loads(bundle.path("tokenizer-runner").read_bytes())
    return Looked(
        bundle.manifest, pte.read(program), program.stat().st_size, tokenizer.get("normalizer") is not None
    )


def _runner_methods(looked: Looked) -> Iterator[str]:
    constants = looked.program.constants
    needed = ("get_eos_ids", "get_max_seq_len", "get_max_context_len")
    if looked.forward is None:
        yield "there is no method forward"
    if missing := [name for name in needed if name not in constants]:
        yield f"the program lacks {', '.join(missing)}"
        return
    sequence, context = constants["get_max_seq_len"], constants["get_max_context_len"]
    if sequence != context:
        yield f"get_max_seq_len is {sequence} and get_max_context_len {context}"


def _fell_out(looked: Looked) -> Iterator[str]:
    if looked.forward is None:
        return
    layers = int(looked.program.constants.get("get_n_layers", 1))
    found = {
        name: count
        for name, count in looked.forward.operators.items()
        if (plain := name.split(".")[0]) not in _EXPECTED
        and (_is_arithmetic(plain) or (count >= layers > 1 and "copy" not in plain))
    }
    if found:
        listed = ", ".join(f"{name} x{count}" for name, count in found.items())
        yield f"arithmetic outside every delegate, one call each: {listed}"


def _is_arithmetic(operator: str) -> bool:
    return operator.split("::")[-1] in _ARITHMETIC or operator.startswith(_QUANTIZERS)


def _no_delegate(looked: Looked) -> Iterator[str]:
    if looked.forward and not looked.forward.delegates:
        calls = sum(looked.forward.operators.values())
        yield f"forward calls no backend: {calls} calls of ExecuTorch's own kernels"


def _outside(looked: Looked) -> Iterator[str]:
    if looked.forward is None:
        return
    kinds: dict[str, int] = {}
    for name, count in looked.forward.operators.items():
        kind = _EXPECTED.get(name.split(".")[0])
        if kind:
            kinds[kind] = kinds.get(kind, 0) + count
    if kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        delegates = sum(looked.forward.delegates.values())
        yield f"each forward is {delegates} delegate calls, and between them {listed} calls of CPU kernels"


def _libraries(looked: Looked) -> Iterator[str]:
    needed = {_LIBRARIES[name] for name in _namespaces(looked) if name in _LIBRARIES}
    yield f"the application links {', '.join(sorted(needed))}"


def _unknown_library(looked: Looked) -> Iterator[str]:
    if unknown := sorted(_namespaces(looked) - _LIBRARIES.keys()):
        yield f"no stock package holds the kernels or backends of {', '.join(unknown)}"


def _namespaces(looked: Looked) -> set[str]:
    names = set()
    for method in looked.program.methods:
        names |= {operator.split("::")[0] for operator in method.operators} | method.delegates.keys()
    return names


def _planned(looked: Looked) -> Iterator[str]:
    if looked.forward is None:
        return
    planned, weights = looked.forward.planned_bytes, looked.program_bytes
    context = looked.manifest.io.context
    yield (
        f"forward plans {human_bytes(planned)} for {context} positions with a KV cache in "
        f"{looked.manifest.io.kv_cache}, beside a program of {human_bytes(weights)} ({planned / weights:.0%})"
    )


def _context_over_weights(looked: Looked) -> Iterator[str]:
    if looked.forward and looked.forward.planned_bytes > looked.program_bytes:
        yield (
            f"forward plans {human_bytes(looked.forward.planned_bytes)}, more than the whole program of "
            f"{human_bytes(looked.program_bytes)}, for a context of {looked.manifest.io.context}"
        )


def _every_position(looked: Looked) -> Iterator[str]:
    for method in looked.program.methods:
        if method.name == "forward_all":
            planned = human_bytes(method.planned_bytes)
            yield f"forward_all, which only parity calls, plans {planned} more when it is loaded"


def _normalize(looked: Looked) -> Iterator[str]:
    form = looked.manifest.io.normalize
    if form != "none":
        yield f"the model's tokenizer applies {form}, and the file for the device's runner does not"


def _normalizes_twice(looked: Looked) -> Iterator[str]:
    if looked.normalizer:
        yield "the tokenizer for the device's runner has a normalizer of its own"


def _matmul_extensions(looked: Looked) -> Iterator[str]:
    if looked.forward and (calls := looked.forward.delegates.get("XnnpackBackend")):
        yield f"{calls} XNNPACK calls a forward: which int8 kernels run depends on the CPU and the build"


RULES = (
    Rule(
        "executorch-runner-methods",
        "error",
        _runner_methods,
        "export it again: ExecuTorch's LLM runner needs them, the lengths equal",
        (Source("our runs of ExecuTorch's TextLLMRunner", confidence="measured by us"),),
    ),
    Rule(
        "executorch-unknown-kernels",
        "warning",
        _unknown_library,
        "link a library of your own that registers them, or export without them",
        (_IOS, _ANDROID),
    ),
    Rule(
        "executorch-no-delegate",
        "warning",
        _no_delegate,
        "export it again with a backend's partitioner",
        (_DELEGATION,),
    ),
    Rule(
        "executorch-arithmetic-outside",
        "warning",
        _fell_out,
        "see which pattern the partitioner did not take, and rewrite the graph before lowering",
        (_DELEGATION,),
    ),
    Rule(
        "executorch-normalizer",
        "warning",
        _normalizes_twice,
        "ship a tokenizer whose normalizer is null, and normalize in the application",
        (
            Source(
                "pytorch-tokenizers 1.5 strips accents in NFC: 3,097 of 4,000 random strings differ",
                confidence="measured by us",
            ),
        ),
    ),
    Rule(
        "executorch-context-memory",
        "warning",
        _context_over_weights,
        "export with a smaller --context, or a KV cache in fp16 or int8 (recipe: executorch.kv_cache)",
        (_MEMORY,),
    ),
    Rule(
        "executorch-planned-memory",
        "info",
        _planned,
        "this is taken when forward is loaded, whatever the length of the prompt",
        (_MEMORY,),
    ),
    Rule(
        "executorch-forward-all",
        "info",
        _every_position,
        "call forward only; a recipe with executorch.all_logits = false leaves it out",
        (_MEMORY,),
    ),
    Rule(
        "executorch-outside",
        "info",
        _outside,
        "nothing: caches, attention and lookups belong there",
        (Source("our exports of the default model", confidence="measured by us"),),
    ),
    Rule(
        "executorch-libraries",
        "info",
        _libraries,
        "iOS: link them by these names with -all_load or -force_load; Android: executorch.aar holds the "
        "XNNPACK backend and the optimized, quantized and LLM kernels",
        (_IOS, _ANDROID),
    ),
    Rule(
        "executorch-normalize",
        "info",
        _normalize,
        "apply that form to the text before the runner's tokenizer",
        (
            Source(
                "pytorch-tokenizers 1.5 against Hugging Face tokenizers",
                confidence="measured by us",
            ),
        ),
    ),
    Rule(
        "executorch-matmul-extensions",
        "info",
        _matmul_extensions,
        "run the bundle's selftest.json on each kind of device; where it fails, build without SME",
        (
            Source(
                "an emulated ARM CPU with SME gave wrong sums for more than one row; Cortex-A76 was exact",
                confidence="measured by us",
            ),
            Source(
                "XNNPACK issue 9898: SME2 int8 convolution crashes on M4, built without SME2 it does not",
                "https://github.com/google/XNNPACK/issues/9898",
                "reported",
            ),
        ),
    ),
)
