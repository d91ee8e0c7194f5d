"""What is in a bundle or a file, without executing it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from mobile_export import bundle, console, onnx_look, pte
from mobile_export.errors import ExportError
from mobile_export.manifest import Manifest
from mobile_export.mlpackage import TensorType, open_package, tensor_type
from mobile_export.onnx_look import OnnxSummary, OnnxValue
from mobile_export.pte import PteSummary, Value
from mobile_export.tensors import read_header


class Weights(msgspec.Struct, frozen=True):
    """The tensors of a GGUF or safetensors file."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    """Tensors by type."""
    metadata: dict[str, Any] = {}
    """A GGUF's short metadata values."""


class PackageFunction(msgspec.Struct, frozen=True):
    """A function of a Core ML package: tensors by name as `dtype [shape]`, ops by type."""

    name: str
    inputs: dict[str, str]
    states: dict[str, str]
    outputs: dict[str, str]
    ops: dict[str, int]


class InspectReport(msgspec.Struct, frozen=True):
    """What `inspect` found; the parts that do not apply are null."""

    kind: Literal["bundle", "pte", "mlpackage", "onnx", "gguf", "safetensors"]
    name: str
    bytes: int
    manifest: Manifest | None = None
    program: PteSummary | None = None
    weights: Weights | None = None
    package: list[PackageFunction] | None = None
    onnx: OnnxSummary | None = None


def inspect(path: Path) -> InspectReport:
    """Look into a bundle (every file is verified), a `.pte`, `.mlpackage`, `.onnx`, `.gguf`
    or `.safetensors`.

    Raises ExportError when it is none of these, damaged, or the bundle is not as its manifest says.
    """
    if path.is_dir() and path.suffix == ".mlpackage":
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return InspectReport("mlpackage", path.name, size, package=_package(path))
    if path.is_dir():
        return _bundle(path)
    if not path.is_file():
        raise ExportError(f"there is no file or folder '{path}'", "check the path")
    size = path.stat().st_size
    if path.suffix == ".pte":
        return InspectReport("pte", path.name, size, program=pte.read(path))
    if path.suffix == ".onnx":
        summary = onnx_look.read(path)
        return InspectReport("onnx", path.name, size + sum(summary.data_files.values()), onnx=summary)
    if path.suffix == ".gguf":
        return InspectReport("gguf", path.name, size, weights=_gguf(path))
    if path.suffix == ".safetensors":
        return InspectReport("safetensors", path.name, size, weights=_safetensors(path))
    raise ExportError(
        f"cannot inspect '{path.name}'",
        "name a bundle's folder, or a .pte, .mlpackage, .onnx, .gguf or .safetensors",
    )


def _bundle(folder: Path) -> InspectReport:
    found = bundle.load(folder)
    bundle.verify(found)
    program = found.path("program")
    summary = pte.read(program) if program.suffix == ".pte" else None
    if summary is not None:
        for name, value in found.manifest.io.constant_methods.items():
            returned = summary.constants.get(name)
            if returned != value and [returned] != value:  # a list of one is a single value in the file
                message = f"the manifest says that {name} is {value}, and the program returns {returned}"
                raise ExportError(message, "export it again")
    package = _package(program) if program.suffix == ".mlpackage" else None
    onnx = onnx_look.read(program) if program.suffix == ".onnx" else None
    name = folder.resolve().name
    return InspectReport("bundle", name, found.bytes, found.manifest, summary, package=package, onnx=onnx)


def _package(path: Path) -> list[PackageFunction]:
    package = open_package(path)
    found = []
    for name in sorted(package.functions):
        kinds = {one.name: tensor_type(one.type) for one in package.functions[name].inputs}
        made = {out.name: out.type for op in package.operations(name) for out in op.outputs}
        outputs = {one: tensor_type(made[one]) for one in package.block(name).outputs}
        ops = Counter(op.type for op in package.operations(name) if op.type != "const")
        found.append(
            PackageFunction(
                name=name,
                inputs={one: _kind(kind) for one, kind in kinds.items() if not kind.state},
                states={one: _kind(kind) for one, kind in kinds.items() if kind.state},
                outputs={one: _kind(kind) for one, kind in outputs.items()},
                ops=dict(ops.most_common()),
            )
        )
    return found


def _kind(kind: TensorType) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in kind.shape)
    return f"{kind.dtype} [{sizes}]"


def _safetensors(path: Path) -> Weights:
    header = read_header(path).values()
    return _weights((math.prod(entry.shape), entry.dtype) for entry in header)


def _gguf(path: Path) -> Weights:
    from mobile_export.checkpoint import gguf_file

    reader = gguf_file.read(path)
    weights = _weights((int(tensor.n_elements), tensor.tensor_type.name) for tensor in reader.tensors)
    metadata = gguf_file.Metadata(reader)
    short = {}
    for key in sorted(reader.fields):
        for kind in (bool, int, float, str):
            value = reader.fields[key].contents()
            if isinstance(value, kind) and len(str(value)) <= 100 and not key.startswith("GGUF."):
                short[key] = metadata.need(key, kind)
                break
    return msgspec.structs.replace(weights, metadata=short)


def _weights(tensors: Iterable[tuple[int, str]]) -> Weights:
    found = list(tensors)
    kinds = Counter(dtype for _, dtype in found)
    return Weights(len(found), sum(count for count, _ in found), dict(sorted(kinds.items())))


def render(report: InspectReport) -> None:
    """Print a report for people."""
    console.say(f"{report.name}  {report.kind}  {console.human_bytes(report.bytes)}")
    if report.manifest is not None:
        _render_manifest(report.manifest)
    if report.program is not None:
        _render_program(report.program)
    for function in report.package or []:
        _render_function(function)
    if report.onnx is not None:
        _render_onnx(report.onnx)
    if report.weights is not None:
        weights = report.weights
        rows = [[dtype, count] for dtype, count in weights.dtypes.items()]
        console.table(
            f"{weights.tensors} tensors, {weights.parameters:,} parameters", ["type", "tensors"], rows
        )
        for key, value in weights.metadata.items():
            console.say(f"{key}  {value}")


def _render_manifest(manifest: Manifest) -> None:
    model, runtime, io = manifest.model, manifest.runtime, manifest.io
    facts = {
        "verified": f"{len(manifest.files)} files are as the manifest says",
        "for": f"{manifest.platform}, {runtime.name} {runtime.minimum_version} or later",
        "model": f"{model.name} ({model.family}, {model.license}), from {model.spec}",
        "model digest": model.digest,
        "recipe": f"{manifest.recipe.name} ({manifest.recipe.digest[:12]})",
        "context": f"{io.context} positions, KV cache {io.kv_cache}, vocabulary {io.vocab}",
        "text": f"apply {io.normalize} before tokenizing" if io.normalize != "none" else "as it is",
        "kernels": ", ".join([*runtime.backends, *runtime.kernels]),
        "CPU needs": ", ".join(runtime.cpu_features),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items())),
    }
    if manifest.target == "executorch":
        facts["kernels"] = facts["kernels"] or "portable only"
    console.table("", ["", ""], [[name, fact] for name, fact in facts.items() if fact])
    for note in runtime.notes:
        console.say(f"note  {note}")
    files = [
        [name, console.human_bytes(file.bytes), file.role] for name, file in sorted(manifest.files.items())
    ]
    console.table("\nFiles", ["name", "size", "role"], files)
    if manifest.quality:
        names = sorted({name for stage in manifest.quality.values() for name in stage})
        rows = [[stage, *(_short(of.get(name)) for name in names)] for stage, of in manifest.quality.items()]
        console.table("\nQuality", ["stage", *names], rows)


def _render_program(program: PteSummary) -> None:
    for method in program.methods:
        console.say(f"\nMethod {method.name}")
        for word, values in (("in", method.inputs), ("out", method.outputs)):
            console.say(f"  {word}  " + ", ".join(_shape(value) for value in values))
        console.say(f"  planned memory  {console.human_bytes(method.planned_bytes)}")
        rows = [[name, count, "delegate"] for name, count in method.delegates.items()]
        rows += [[name, count, "outside"] for name, count in method.operators.items()]
        console.table("", ["call", "times", "where"], rows)
    constants = [[name, value] for name, value in program.constants.items()]
    console.table("\nConstant methods", ["name", "returns"], constants)
    sizes = [[kind, console.human_bytes(size)] for kind, size in program.segments.items()]
    console.table("\nSegments", ["kind", "size"], sizes)


def _render_function(function: PackageFunction) -> None:
    console.say(f"\nFunction {function.name}")
    for word, values in (("in", function.inputs), ("state", function.states), ("out", function.outputs)):
        console.say(f"  {word}  " + ", ".join(f"{name} {kind}" for name, kind in values.items()))
    console.say("  ops  " + ", ".join(f"{name} {count}" for name, count in function.ops.items()))


def _render_onnx(model: OnnxSummary) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in model.opsets.items())
    console.say(f"\nONNX {model.ir_version}, {opsets}, by {model.producer or 'nobody'}")
    for word, values in (("in", model.inputs), ("out", model.outputs)):
        console.say(f"  {word}  " + ", ".join(_layers(values)))
    console.table("", ["operator", "nodes"], list(model.operators.items()))
    rows = [[kind, console.human_bytes(size)] for kind, size in model.weights.items()]
    rows += [["of these shared", console.human_bytes(model.shared_bytes)]] if model.shared_bytes else []
    console.table("\nWeights", ["type", "size"], rows)
    for name, size in model.data_files.items():
        console.say(f"{name}  {console.human_bytes(size)}")
    for kind, codes in (("int8", model.int8_codes), ("int4", model.int4_codes)):
        if codes:
            count = sum(rows * columns for rows, columns in codes.values())
            console.say(f"{kind} codes  {len(codes)} tensors, {count:,} values")


def _layers(values: list[OnnxValue]) -> list[str]:
    """One entry for all values that differ in a layer's number only."""
    found: dict[tuple[str, str], list[str]] = {}
    for value in values:
        kind = f"{value.dtype} [{', '.join(map(str, value.shape))}]" + " or its default" * value.optional
        pattern = re.sub(r"\d+", "*", value.name)
        found.setdefault((pattern, kind), []).append(value.name)
    return [
        f"{names[0]} {kind}" if len(names) == 1 else f"{len(names)} {pattern} {kind}"
        for (pattern, kind), names in found.items()
    ]


def _shape(value: Value) -> str:
    return f"{value.dtype} {value.shape}" + (" at most" if value.dynamic else "")


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
