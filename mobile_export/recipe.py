"""A recipe says how a model becomes an artefact: TOML in, a frozen `Recipe` with a digest out."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from mobile_export.errors import ExportError, nearest


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Quantize(_Table, frozen=True):
    """How weights become codes. int8 symmetric per output channel is what all runtimes share."""

    weights: Literal["int8", "int4", "fp32"] = "int8"
    """int4: a scale for each group of columns; embedding and head stay int8. fp32: no codes at all, for a
    target that speculative decoding or a comparison needs whole."""
    group_size: Literal[16, 32, 64, 128] = 32
    """int4: columns of a row that share a scale."""
    rounding: Literal["nearest", "compensated"] = "compensated"
    """How codes are chosen: each nearest to its weight, or for the least error of the layer's output."""
    rotate: bool = False
    """Whether weights first move into a basis whose activations int8 and fp16 hold better (passes/rotate)."""


class ExecuTorch(_Table, frozen=True):
    """Options of the ExecuTorch target."""

    kv_cache: Literal["fp32", "fp16", "int8"] = "fp32"
    """Type of the KV cache inside the `.pte`: int8 is per token and head, with fp32 scales."""
    all_logits: bool = True
    """Add the method `forward_all` (logits at every position) that full parity needs."""
    mlp_parts: int = 1
    """Parts of each MLP whose activations are rounded apart; one where it does not divide the width."""


class CoreML(_Table, frozen=True):
    """Options of the Core ML target."""

    chunk: int = 64
    """Tokens a call of `prefill` takes."""
    all_logits: bool = True
    """Add the function `prefill_all` (logits at every position of a chunk) that full parity needs."""
    flexible: bool = False
    """One function `main` for any number of tokens instead; with state it stays off the Neural Engine."""


class ONNX(_Table, frozen=True):
    """Options of the ONNX target."""

    kv_cache: Literal["fp32", "fp16"] = "fp32"
    """Type of the KV cache, which the caller owns."""
    block: Literal[16, 32, 64, 128, 256] = 128
    """Columns that share one scale of the activations inside a product; a weight's own scale is its row's."""
    accuracy_level: Literal[0, 4] = 4
    """4: activations are int8 inside a product. 0: fp32, for CPUs without dot-product instructions."""
    ort: bool = False
    """Also write `model.ort`, for minimal builds of the runtime."""


class Threshold(_Table, frozen=True):
    """Limits between two stages; a stage over any of them fails."""

    kl_mean: float
    """Mean KL divergence in nats per position, at most."""
    top1: float
    """Share of positions with the same most likely token, at least."""


class Cut(_Table, frozen=True):
    """How far the artefact may differ from itself when its input is cut into calls differently.

    A runtime that quantizes activations rounds at thresholds: a last-bit difference between kernels
    for one row and for many flips codes, and grows to the size of the quantization error itself.
    """

    kl_max: float = 0.15
    """KL divergence in nats at any position, at most."""
    margin: float = 2.0
    """The most likely token is the same wherever the top two logits are further apart than this."""


class Evaluated(_Table, frozen=True):
    """What a Core ML package may lose in the evaluator, where activations are not quantized."""

    total: Threshold = Threshold(kl_mean=0.003, top1=0.97)
    """Against the source, in either arithmetic."""
    rounding: Threshold = Threshold(kl_mean=0.002, top1=0.97)
    """Against the stage before: in fp32 the quantized program, in per-op fp16 the package in fp32."""


class Parity(_Table, frozen=True):
    """What each stage may lose against the stage before it, and the artefact against the source."""

    traced: Threshold = Threshold(kl_mean=1e-6, top1=0.999)
    quantized: Threshold = Threshold(kl_mean=0.005, top1=0.96)
    artifact: Threshold = Threshold(kl_mean=0.01, top1=0.94)
    total: Threshold = Threshold(kl_mean=0.012, top1=0.93)
    cut: Cut = Cut()
    coreml: Evaluated = Evaluated()


class Gate(_Table, frozen=True):
    """What the tasks of `mobile-export evaluate` may lose in an artefact, against the source."""

    perplexity_ratio: float = 1.01
    """Perplexity over the text set, divided by the source's, at most."""
    fewer_passes: int = 2
    """Problems that the source solves more than the artefact does, at most."""


class Recipe(_Table, frozen=True):
    """One way to export: everything that shapes the artefact's bytes, and the limits it must keep."""

    name: str
    context: int = 2048
    """Positions the KV cache holds: prompt and answer together."""
    quantize: Quantize = Quantize()
    executorch: ExecuTorch = ExecuTorch()
    coreml: CoreML = CoreML()
    onnx: ONNX = ONNX()
    parity: Parity = Parity()
    gate: Gate = Gate()

    @property
    def digest(self) -> str:
        """sha256 of the recipe's canonical JSON."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return Path(__file__).parent / "recipes"


def load_recipe(name_or_file: str = "int8", *, context: int | None = None) -> Recipe:
    """Read a recipe by the name of one in the package, or a TOML file; `context` overrides its own.

    Raises ExportError for an unknown name, an unknown key (with its path and the nearest known
    one), a value of the wrong type, or a context below 1.
    """
    path = Path(name_or_file)
    if path.suffix != ".toml":
        known = [file.stem for file in recipe_folder().glob("*.toml")]
        if name_or_file not in known:
            raise ExportError(f"unknown recipe '{name_or_file}'", nearest(name_or_file, known))
        path = recipe_folder() / f"{name_or_file}.toml"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExportError(f"cannot read recipe '{name_or_file}': {reason}", "check the file") from None
    table.setdefault("name", path.stem)
    if context is not None:
        table["context"] = context
    recipe = parse_recipe(table)
    if recipe.context < 1:
        raise ExportError(f"context {recipe.context} is too small", "use --context 1 or more, e.g. 2048")
    return recipe


def parse_recipe(table: dict[str, Any]) -> Recipe:
    """A checked `Recipe` from a parsed TOML table; errors name the key's path."""
    _refuse_unknown(table, Recipe, "")
    try:
        return msgspec.convert(table, Recipe)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.?(.*)`$", str(error))
        where = found.group(1) if found else ""
        reason = str(error).split(" - at ")[0]
        raise ExportError(f"recipe key '{where}': {reason}", "correct the recipe") from None


def _refuse_unknown(table: dict[str, Any], kind: type[msgspec.Struct], prefix: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise ExportError(f"unknown recipe key '{prefix}{key}'", nearest(key, fields))
        inner = fields[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, f"{prefix}{key}.")
