"""What the rules for ONNX read: the model without its weights, and the files beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from mobile_export import onnx_look
from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.manifest import Manifest
from mobile_export.onnx_look import OnnxSummary, OnnxValue, open_model, summary

PAST = "past_key_values."
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}


class GenaiDecoder(msgspec.Struct, frozen=True):
    """The part of genai_config.json that says which model it is for."""

    filename: str
    outputs: dict[str, str]


class _GenaiModel(msgspec.Struct, frozen=True):
    decoder: GenaiDecoder


class _Genai(msgspec.Struct, frozen=True):
    model: _GenaiModel


@dataclass(frozen=True)
class Looked:
    """What the checks read."""

    manifest: Manifest
    model: OnnxSummary
    attributes: dict[str, list[dict[str, int]]]
    """Integer attributes of the nodes of each operator."""
    genai: GenaiDecoder | None
    """What genai_config.json says, if the bundle has one."""
    genai_model: OnnxSummary | None
    """The model that it names, if the bundle has it."""
    listed: dict[tuple[str, int], set[str]] | None
    """required_operators.config, if the bundle has one."""
    needed: dict[tuple[str, int], set[str]]
    """What it should list."""

    @property
    def products(self) -> list[dict[str, int]]:
        """Of quantized weights."""
        return self.attributes.get("com.microsoft:MatMulNBits", [])

    @property
    def int8_products(self) -> int:
        """Products whose activations are int8 too."""
        return sum(product.get("accuracy_level") == 4 for product in self.products)

    @property
    def caches(self) -> list[OnnxValue]:
        """The inputs that hold keys and values."""
        return [value for value in self.model.inputs if value.name.startswith(PAST)]

    @property
    def cache_bytes(self) -> int:
        """All caches over the whole context."""
        context = self.manifest.io.context
        return sum(
            math.prod(context if isinstance(size, str) else size for size in cache.shape)
            * _WIDTHS.get(cache.dtype, 0)
            for cache in self.caches
        )

    @property
    def weight_bytes(self) -> int:
        """Each stored byte once."""
        return sum(self.model.weights.values()) - self.model.shared_bytes


def look(bundle: Bundle) -> Looked:
    """Read the bundle's `.onnx`. ExportError when it has none, or it is damaged."""
    from mobile_export.targets.onnx_deploy import GENAI_CONFIG, OPERATORS, required_operators

    path = bundle.path("program")
    if path.suffix != ".onnx":
        raise ExportError(f"this bundle's program is '{path.name}', not a .onnx", "export it again")
    model = open_model(path)
    attributes: dict[str, list[dict[str, int]]] = {}
    for node in onnx_look.nodes(model):
        integers = {attribute.name: attribute.i for attribute in node.attribute if attribute.HasField("i")}
        attributes.setdefault(onnx_look.operator(node), []).append(integers)
    genai = _genai(bundle, GENAI_CONFIG)
    named = genai.filename if genai else ""
    listed = bundle.folder / OPERATORS if OPERATORS in bundle.manifest.files else None
    return Looked(
        bundle.manifest,
        summary(model, path),
        attributes,
        genai,
        onnx_look.read(bundle.folder / named) if named in bundle.manifest.files else None,
        _operators(listed.read_text("utf-8")) if listed else None,
        _operators(required_operators(path)),
    )


def _genai(bundle: Bundle, name: str) -> GenaiDecoder | None:
    if name not in bundle.manifest.files:
        return None
    try:
        return msgspec.json.decode((bundle.folder / name).read_bytes(), type=_Genai).model.decoder
    except msgspec.DecodeError as error:
        raise ExportError(f"'{name}' is damaged: {error}", "export it again") from None


def _operators(text: str) -> dict[tuple[str, int], set[str]]:
    """Operators by domain and opset, of lines `domain;opset,opset;op,op`."""
    found: dict[tuple[str, int], set[str]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(";")]
        if len(fields) == 3 and not line.startswith("#"):
            for opset in fields[1].split(","):
                if opset.isdigit():
                    found.setdefault((fields[0], int(opset)), set()).update(fields[2].split(","))
    return found
