"""Where the ONNX rules are from."""

from __future__ import annotations

from mobile_export.lint import Source

_REPO = "https://github.com/microsoft/onnxruntime"
_DOCS = "https://onnxruntime.ai/docs"

VERSIONS = (
    Source(
        "our exports in ONNX Runtime 1.22 to 1.32: 1.22 refuses IR version 11; before 1.32 attention fails "
        "with an fp16 cache beside fp32 queries",
        confidence="measured by us",
    ),
    Source(
        "ONNX Runtime pull request 25214: GatherBlockQuantized gets the attribute bits, and 8 bits",
        f"{_REPO}/pull/25214",
    ),
    Source("ONNX Runtime, compatibility with opsets", f"{_DOCS}/reference/compatibility.html"),
)
DOT_PRODUCT = (
    Source(
        "int8 products ended with SIGILL on an emulated Cortex-A53 and A72 (Raspberry Pi 4B) and ran on A76; "
        "fp32 products ran on all three",
        confidence="measured by us",
    ),
    Source(
        "ONNX Runtime pull request 29466: ARM cores with dot product are Neoverse, Cortex-A76 and later, "
        "Snapdragon X, Apple M",
        f"{_REPO}/pull/29466",
        "reported",
    ),
)
CONTRIB = Source("ONNX Runtime, contrib operators", f"{_REPO}/blob/main/docs/ContribOperators.md")
STOCK = Source(
    "onnxruntime-android: all types and operators",
    "https://mvnrepository.com/artifact/com.microsoft.onnxruntime/onnxruntime-android",
)
REDUCED = Source("ONNX Runtime, Build a custom package", f"{_DOCS}/build/custom.html")
GENAI = (
    Source("onnxruntime-genai, genai_config.json", f"{_DOCS}/genai/reference/config.html"),
    Source(
        "onnxruntime-genai 0.18 gives logits room for every token unless the model declares one row",
        confidence="measured by us",
    ),
)
CONTRACT = (Source("bundles are called by their manifest's names", confidence="measured by us"),)
DATA_FILE = (
    Source(
        "ONNX Runtime issue 9759: Android gives no path to an asset",
        f"{_REPO}/issues/9759",
        "reported",
    ),
    Source(
        "ONNX Runtime pull request 23557: the folder of data files, for a model that is loaded from memory",
        f"{_REPO}/pull/23557",
    ),
)
PLAY = (
    Source(
        "Google Play, size limits: base module 200 MB, an asset pack 1.5 GB",
        "https://support.google.com/googleplay/android-developer/answer/9859372",
    ),
)
TELEMETRY = (
    Source("ONNX Runtime, Privacy: on by default on Android and iOS", f"{_REPO}/blob/main/docs/Privacy.md"),
    Source(
        "the library of 1.29 knows ORT_DISABLE_TELEMETRY, that of 1.27 does not", confidence="measured by us"
    ),
)
MEMORY = Source(
    "our exports of the default model in ONNX Runtime 1.32: once loaded, the weights are in memory of the "
    "process's own, packed, and no longer mapped",
    confidence="measured by us",
)
PROVIDERS = (
    Source(
        "ONNX Runtime, CoreML execution provider: its operators",
        f"{_DOCS}/execution-providers/CoreML-ExecutionProvider.html",
    ),
    Source(
        "ONNX Runtime, NNAPI execution provider: its operators",
        f"{_DOCS}/execution-providers/NNAPI-ExecutionProvider.html",
    ),
    Source(
        "Android: NNAPI is deprecated",
        "https://developer.android.com/ndk/guides/neuralnetworks/migration-guide",
    ),
)
