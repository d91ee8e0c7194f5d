"""manifest.json: what a bundle says about itself. The schema file is generated from this.

Regenerate it with `python -m mobile_export.schemas`; a test compares.
"""

from importlib.metadata import version
from typing import Any, Literal

import msgspec

FORMAT = "mobile-export-bundle"
SCHEMA_VERSION = 1

Role = Literal[
    "program",
    "tokenizer",
    "tokenizer-runner",
    "tokenizer-config",
    "chat-template",
    "selftest",
    "runtime-config",
    "notice",
    "model-card",
]
Scalar = bool | int | float | str


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Model(_Table, frozen=True):
    """The model the weights came from."""

    name: str
    spec: str
    """What the user typed to get it."""
    family: str
    license: str
    digest: str
    """sha256 over its config, tokenizer and weights."""
    provenance: dict[str, Any] = {}


class RecipeUsed(_Table, frozen=True):
    """The whole recipe, as it was read."""

    name: str
    digest: str
    table: dict[str, Any]


class Runtime(_Table, frozen=True):
    """What must be on the device."""

    name: str
    minimum_version: str
    kernels: list[str] = []
    backends: list[str] = []
    outside_backend: dict[str, int] = {}
    """How often each operator is called outside any backend."""
    cpu_features: list[str] = []
    """What the CPU must have, as `architecture:flag`, the flag as Linux's /proc/cpuinfo names it."""
    notes: list[str] = []


class TensorInfo(_Table, frozen=True):
    """A method's input or output. A string in `shape` names a dimension that varies, and its bound."""

    name: str
    dtype: str
    shape: list[int | str]


class Method(_Table, frozen=True):
    """A method of the program, its tensors in call order."""

    name: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    states: list[TensorInfo] = []
    """What the runtime keeps from call to call, and all methods share."""


class Contract(_Table, frozen=True):
    """How an application calls the program."""

    methods: list[Method]
    constant_methods: dict[str, Scalar | list[int]]
    context: int
    """Positions the KV cache holds: prompt and answer together."""
    vocab: int
    kv_cache: str
    """dtype of the KV cache."""
    eos_ids: list[int]
    bos_id: int | None
    normalize: Literal["NFC", "none"]
    """What the caller does to text before `tokenizer-runner`, which does not normalize itself."""


class File(_Table, frozen=True):
    """One file of the bundle."""

    sha256: str
    bytes: int
    role: Role


class Manifest(_Table, frozen=True):
    """Everything a bundle says about itself."""

    platform: str
    """`android` or `ios`."""
    target: str
    """`executorch` or `coreml`."""
    model: Model
    recipe: RecipeUsed
    tools: dict[str, str]
    """Versions of the packages that shaped the bytes."""
    runtime: Runtime
    io: Contract
    quality: dict[str, dict[str, Scalar]] = {}
    """Per stage, the metrics of the export's own parity check."""
    files: dict[str, File] = {}
    """By path inside the bundle, `/` between parts; filled in when the bundle is written."""
    format: Literal["mobile-export-bundle"] = "mobile-export-bundle"
    schema_version: Literal[1] = 1


def encode(manifest: Manifest) -> bytes:
    """Deterministic JSON: sorted keys, two spaces, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name, ours among them."""
    import mobile_export

    return {"mobile-export": mobile_export.__version__, **{name: version(name) for name in packages}}
