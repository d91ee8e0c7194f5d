"""Where the Core ML rules are from. Apple documents little of this: most is what people report."""

from __future__ import annotations

from mobile_export.lint import Source

_GUIDES = "https://apple.github.io/coremltools/docs-guides/source"
_ISSUES = "https://github.com/apple/coremltools/issues"

STATE_32 = (
    Source(
        "coremltools issue 2631: a state 270 wide fails on the Neural Engine, 256 works",
        f"{_ISSUES}/2631",
        "reported",
    ),
)
IOS_LIMITS = (
    Source("coremltools, Stateful Models: from iOS 18", f"{_GUIDES}/stateful-models.html"),
    Source("coremltools, Multifunction Models: from iOS 18", f"{_GUIDES}/multifunction-models.html"),
    Source("coremltools 9.0's own opsets: scaled_dot_product_attention, constexpr_blockwise_shift_scale"),
)
FLEXIBLE = (
    Source(
        "an Apple engineer: with range flexibility only the default shape runs on the Neural Engine",
        "https://developer.apple.com/forums/thread/724930",
        "reported",
    ),
    Source(
        "coremltools issue 2600: a Llama with states and flexible inputs runs on the CPU",
        f"{_ISSUES}/2600",
        "reported",
    ),
)
WIDE = (
    Source(
        "ONNX Runtime issue 19543, which points to coremltools issue 1003: no input above 16384",
        "https://github.com/microsoft/onnxruntime/issues/19543",
        "reported",
    ),
    Source(
        "CoreML-LLM: a head of 262,144 split into 16 decoded slower on an iPhone 17 Pro",
        "https://raw.githubusercontent.com/john-rocky/CoreML-LLM/main/docs/SESSION_2026_04_28_LMSPLIT_FINALISE.md",
        "reported",
    ),
)
PALETTES = (
    Source(
        "coremltools issue 2716: crashes after 100 to 200 predictions on the Neural Engine; 8.3.0 does not",
        f"{_ISSUES}/2716",
        "reported",
    ),
)
TYPED = Source("coremltools, Typed Execution Workflow Example", f"{_GUIDES}/typed-execution-example.html")
MEMORY_LIMITS = (
    Source(
        "Apple, increased-memory-limit entitlement",
        "https://developer.apple.com/documentation/bundleresources/entitlements/com.apple.developer.kernel.increased-memory-limit",
    ),
    Source(
        "Apple, os_proc_available_memory",
        "https://developer.apple.com/documentation/os/os_proc_available_memory",
    ),
    Source(
        "4 GB: OLMoE.swift on iPhone 12 mini", "https://github.com/allenai/OLMoE.swift/pull/38", "reported"
    ),
    Source(
        "6 GB: PocketPal on iPhone 13 Pro", "https://github.com/a-ghorbani/pocketpal-ai/pull/651", "reported"
    ),
    Source("8 GB: RTAB-Map on iPhone 15 Pro", "https://github.com/introlab/rtabmap/pull/1446", "reported"),
)
ATTENTION = (
    Source(
        "ExecuTorch, ANE-friendly Llama models: attention without 5-D tensors is faster, and right on iOS 26",
        "https://github.com/pytorch/executorch/blob/main/examples/apple/coreml/llama/readme.md",
        "reported",
    ),
    Source(
        "ExecuTorch pull request 16144: attention decomposed for iOS 26's numerics",
        "https://github.com/pytorch/executorch/pull/16144",
        "reported",
    ),
)
INT_INPUTS = (
    Source(
        "coremltools issue 2365: integer inputs bring casts and ops that are forced on the CPU",
        f"{_ISSUES}/2365",
        "reported",
    ),
)
ANE_WRITES = (
    Source(
        "coreai-torch issue 6: the Neural Engine's compiler crashes on a slice update at a runtime position; "
        "seen in Core AI, not in Core ML",
        "https://github.com/apple/coreai-torch/issues/6",
        "reported",
    ),
)
HF_KEYS = (
    Source(
        "swift-transformers, the keys of LanguageModel",
        "https://github.com/huggingface/swift-transformers/blob/main/Sources/Models/LanguageModel.swift",
    ),
)
