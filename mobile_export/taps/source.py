"""The source model's values, by forward hooks on its modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobile_export.taps.points import Call, Place, Point, Values

if TYPE_CHECKING:
    from torch import Tensor

    from mobile_export.types import Checkpoint

_IN_LAYER = re.compile(r"layers\.(\d+)(?:\.(.+))?$")


def values(checkpoint: Checkpoint, points: Sequence[Point], calls: Sequence[Call]) -> list[Values]:
    """By call, of the fp32 Hugging Face model; the sums inside a layer and the keys are not modules'."""
    from mobile_export.targets.source import HFRunner

    model = checkpoint.model()
    seen: list[Values] = []
    products = {point.index: point.place for point in points if point.role == "product"}
    readers = {products[point.index]: point.place for point in points if point.role == "operand"}
    layers = 1 + max(place.layer for place in products.values() if place.layer is not None)

    def keep(place: Place, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen[-1][place] = value[0].detach().float().clone()

    def hook(place: Place) -> Any:
        def after(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            keep(place, output)
            if place in readers:
                keep(readers[place], inputs)

        return after

    for name, module in model.named_modules():
        found = _IN_LAYER.search(name)
        if found and int(found.group(1)) < layers:
            place = Place(int(found.group(1)), found.group(2) or "mlp.residual")
            if place in products.values() or not found.group(2):
                module.register_forward_hook(hook(place))
    model.get_input_embeddings().register_forward_hook(hook(Place(None, "embed_tokens")))
    model.get_output_embeddings().register_forward_hook(hook(Place(None, "lm_head")))
    runner = HFRunner(model)
    for call in calls:
        seen.append({})
        runner.logits(call.tokens, call.start)
    return seen
