"""An ONNX model's values: a copy of its graph, in memory, gives them as outputs; weights stay the file's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.recipe import Recipe
from mobile_export.taps.arithmetic import FP16, FP32, Int8Activations, Plain
from mobile_export.taps.points import Call, Point, Values
from mobile_export.targets.onnx_io import LOGITS, MASK, PAST, PRESENT, TOKENS

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto

_PRODUCTS = ("MatMulNBits", "Gemm")
_SUMS = {"SkipSimplifiedLayerNormalization": 3, "Add": 0}
"""Which output of a node is the sum."""


def arithmetic(recipe: Recipe) -> Plain:
    """As the recipe says of products and cache."""
    cache = FP16 if recipe.onnx.kv_cache == "fp16" else 0.0
    if recipe.quantize.weights == "fp32" or recipe.onnx.accuracy_level == 0:
        return Plain(FP32, cache)
    return Int8Activations(FP32, cache, recipe.onnx.block)


def values(artifact: Path, points: Sequence[Point], calls: Sequence[Call], recipe: Recipe) -> list[Values]:
    """By call, of the model's own nodes in ONNX Runtime."""
    import numpy as np
    import onnx
    import torch

    from mobile_export.targets.onnx import runtime

    model = onnx.load(artifact, load_external_data=False)
    names = _names(model, points)
    outputs = {value.name for value in model.graph.output}
    for name in dict.fromkeys(name for name, _ in names.values()):
        if name not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(artifact.parent.resolve()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    caches: dict[str, np.ndarray] = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), _dtype(value.type))
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }
    asked = [value.name for value in session.get_outputs()]
    seen: list[Values] = []
    for call in calls:
        total = call.start + len(call.tokens)
        given = {TOKENS: np.array([call.tokens], np.int64), MASK: np.ones((1, total), np.int64), **caches}
        made = dict(zip(asked, session.run(asked, given), strict=True))
        caches = {name: made[name.replace(PAST, PRESENT)] for name in caches}
        seen.append({})
        for point in points:
            if point.place in names:
                name, columns = names[point.place]
                value = _rows(made[name], call.start)[:, columns]
                seen[-1][point.place] = torch.from_numpy(value.astype(np.float32))
    return seen


def _names(model: ModelProto, points: Sequence[Point]) -> dict[Any, tuple[str, slice]]:
    """The value and its columns at each place; unnamed outputs get a name."""
    everything = slice(None)
    by = {(point.role, point.index): point for point in points}
    found: dict[Any, tuple[str, slice]] = {}
    for index, (operand, product, columns) in enumerate(_products(model, points)):
        found[by["product", index].place] = product, columns
        if ("operand", index) in by:
            found[by["operand", index].place] = operand, everything
    sums = (_sum(node) for node in model.graph.node if node.op_type in _SUMS)
    named = {"sum": list(sums), "embedding": [_embedding(model)]}
    named["keys"] = sorted(
        (value.name for value in model.graph.output if value.name.endswith(".key")),
        key=lambda name: int(name.split(".")[1]),
    )
    for role, names in named.items():
        for index, name in enumerate(names):
            found[by[role, index].place] = name, everything  # type: ignore[index]
    return found


def _products(model: ModelProto, points: Sequence[Point]) -> Iterator[tuple[str, str, slice]]:
    """Operand, product and columns of each linear; some share a product, the head has several."""
    widths = [point.width for point in points if point.role == "product"]
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in _PRODUCTS]
    done = 0
    for node in nodes:
        rows, first = shapes[node.input[1]][0], 0
        if done == len(widths) - 1:
            yield node.input[0], LOGITS, slice(None)
            return
        while first < rows:
            yield node.input[0], node.output[0], slice(first, first + widths[done])
            first += widths[done]
            done += 1


def _sum(node: NodeProto) -> str:
    at = _SUMS[node.op_type]
    node.output.extend([""] * (at + 1 - len(node.output)))
    if not node.output[at]:
        node.output[at] = f"{node.output[0]}_sum"
    return node.output[at]


def _embedding(model: ModelProto) -> str:
    """What the first norm reads."""
    return next(node for node in model.graph.node if "Normalization" in node.op_type).input[0]


def _rows(value: np.ndarray, start: int) -> np.ndarray:
    """[rows, width]; of a cache [1, heads, positions, head_dim] the new positions."""
    if value.ndim == 4:
        value = value[:, :, start:].swapaxes(1, 2)
    return value.reshape(-1, value.shape[-1] if value.ndim < 4 else value.shape[2] * value.shape[3])


def _dtype(name: str) -> str:
    return "float16" if name == "tensor(float16)" else "float32"
