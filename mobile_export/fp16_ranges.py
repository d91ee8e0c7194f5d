"""How near each op of a Core ML bundle comes to the end of fp16's range, on the bundle's own self-test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mobile_export.bundle import Bundle, verify
from mobile_export.errors import ExportError
from mobile_export.targets import target

if TYPE_CHECKING:
    from mobile_export.evaluate.ranges import OpRange, Ranges

WORST = 20


def measure(bundle: Bundle) -> list[OpRange]:
    """Run the self-test's prompts in fp32 arithmetic; the `WORST` largest |value|, largest first.

    ExportError: not a Core ML bundle, or not as its manifest says.
    """
    return _run(bundle).worst(WORST)


def by_layer(bundle: Bundle) -> list[OpRange]:
    """Of each layer, and of what is in none, the op with the largest |value|; as `measure` otherwise."""
    largest: dict[int | None, OpRange] = {}
    for one in _run(bundle).all():
        if one.layer not in largest or one.largest > largest[one.layer].largest:
            largest[one.layer] = one
    return sorted(largest.values(), key=lambda one: (one.layer is None, one.layer or 0))


def _run(bundle: Bundle) -> Ranges:
    if bundle.manifest.target != "coreml":
        raise ExportError("only Core ML bundles compute in fp16", "name a bundle that `ios` exported")
    verify(bundle)
    from mobile_export.evaluate import ranges

    runner = target("coreml").open(bundle.path("program"), arithmetic="fp32")
    runner.tap = tap = ranges.Ranges()
    for case in json.loads(bundle.path("selftest").read_bytes())["cases"]:
        runner.reset()
        runner.last_logits(case["tokens"], 0)
    return tap


def rows(found: list[OpRange]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for `console.table`."""
    lines = [
        [
            one.name,
            one.op,
            "-" if one.layer is None else str(one.layer),
            f"{one.largest:.4g}",
            f"{one.share:.2%}",
        ]
        for one in found
    ]
    return "Nearest to fp16's largest value, 65504", ["op", "type", "layer", "largest", "share"], lines
