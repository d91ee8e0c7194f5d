"""Core ML: the program as a stateful `.mlpackage` (ML Program, iOS 18), proven by our evaluator.

The evaluator runs the saved package by the documented semantics of its ops; it is not the device.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mobile_export import quiet
from mobile_export.manifest import Contract, Method, Runtime, TensorInfo
from mobile_export.mlpackage import open_package
from mobile_export.targets import Lowered, need_int8
from mobile_export.targets.coreml_graph import LOGITS, STATES, Functions
from mobile_export.types import Checkpoint, Dims, Program

if TYPE_CHECKING:
    import numpy as np

    from mobile_export.bundle import Draft
    from mobile_export.recipe import CoreML as Options
    from mobile_export.recipe import Recipe

ARITHMETICS = ("fp32", "fp16")
CLAIM = "Verified against the documented semantics of the program, not on the device."
PACKAGE = "model.mlpackage"
_DATA = "Data/com.apple.CoreML"
FLEXIBLE = "main"
_IOS18 = 9
"""Specification version of Core ML's format for iOS 18."""
_DOCUMENTED = {
    "tokens": "Token ids; in prefill, ids past the last real one are ignored.",
    "start": "Position in the KV cache of the first token: how many came before.",
    "last": "Index in tokens of the last real one, whose logits are wanted; or of several.",
    "logits": "Unnormalized log-probabilities of the next token.",
    "key_cache": "Keys of every layer, written by each call.",
    "value_cache": "Values of every layer, written by each call.",
}


def write(program: Program, recipe: Recipe, checkpoint: Checkpoint, draft: Draft) -> Lowered:
    """Write `model.mlpackage` into a bundle and say what it needs and how it is called."""
    from mobile_export.checkpoint.load import eos_ids

    need_int8(recipe, "Core ML")
    for name in ("Manifest.json", f"{_DATA}/model.mlmodel", f"{_DATA}/weights/weight.bin"):
        draft.path(f"{PACKAGE}/{name}", "program")
    artifact = draft.folder / PACKAGE
    about = {
        "short": f"{checkpoint.name}: int8 weights, KV cache of {program.dims.context} positions as state",
        "license": checkpoint.license,
    }
    lower(program, recipe.coreml, about, artifact)
    runtime = Runtime(
        name="Core ML",
        minimum_version="iOS 18",
        notes=[
            CLAIM,
            _how(recipe.coreml),
        ],
    )
    io = Contract(
        methods=_methods(program.dims, recipe.coreml),
        constant_methods={},
        context=program.dims.context,
        vocab=program.dims.vocab,
        kv_cache="fp16",
        eos_ids=eos_ids(checkpoint),
        bos_id=checkpoint.tokenizer().bos_token_id,
        normalize="none",
    )
    return Lowered(artifact, runtime, io, ("coremltools",))


def lower(program: Program, options: Options, about: dict[str, str], out: Path) -> None:
    """Write the package's files; the same program gives the same bytes."""
    with quiet.native():
        from coremltools.converters.mil.backend.mil.load import load
        from coremltools.converters.mil.mil import Program as MIL

        functions = Functions(program)
        made = MIL()
        for name, (length, every) in _lengths(program.dims, options).items():
            made.add_function(name, functions.make(length, every=every))
        made.default_function_name = next(iter(made.functions))
        made.export_as_multifunction = len(made.functions) > 1
        made.skip_all_passes = True
        weights = out / _DATA / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        spec = load(made, str(weights), specification_version=_IOS18)
    _describe(spec, about)
    (out / _DATA / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    (out / "Manifest.json").write_bytes(_package_manifest())


def _lengths(dims: Dims, options: Options) -> dict[str, tuple[int | None, bool]]:
    """Functions by name: tokens a call (None: any number), and whether logits of every position are given."""
    if options.flexible:
        return {FLEXIBLE: (None, False)}
    chunk = min(options.chunk, dims.context)
    every = {"prefill_all": (chunk, True)} if options.all_logits else {}
    return {"decode": (1, False), "prefill": (chunk, False), **every}


def _describe(spec: Any, about: dict[str, str]) -> None:
    import mobile_export

    metadata = spec.description.metadata
    metadata.shortDescription = about["short"]
    metadata.license = about["license"]
    metadata.versionString = mobile_export.__version__
    metadata.author = "mobile-export"
    for function in spec.description.functions or [spec.description]:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = _DOCUMENTED[feature.name]


def _package_manifest() -> bytes:
    """Apple's package index, with ids that follow from the paths."""
    items = {}
    for name, path, what in (
        ("model.mlmodel", "com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
        ("weights", "com.apple.CoreML/weights", "CoreML Model Weights"),
    ):
        entry = {"author": "com.apple.CoreML", "description": what, "name": name, "path": path}
        items[str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()] = entry
    root = next(iter(items))
    index = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    return json.dumps(index, indent=4, sort_keys=True).encode() + b"\n"


def _how(options: Options) -> str:
    if options.flexible:
        return (
            "main takes the whole prompt, then token by token; shapes that vary stay off the Neural Engine."
        )
    return "All functions share weights and state: prefill in chunks, then decode token by token."


def _methods(dims: Dims, options: Options) -> list[Method]:
    cache = [dims.layers, dims.kv_heads, dims.context, dims.head_dim]
    states = [TensorInfo(name=name, dtype="fp16", shape=list(cache)) for name in STATES]
    methods = []
    for name, (length, every) in _lengths(dims, options).items():
        inputs = [
            TensorInfo(name="tokens", dtype="int32", shape=[1, length or f"length<={dims.context}"]),
            TensorInfo(name="start", dtype="int32", shape=[1]),
        ]
        asked: int | str = 1 if length else f"asked<={dims.context}"
        if length != 1 and not every:
            inputs.append(TensorInfo(name="last", dtype="int32", shape=[asked]))
        answers = length if every and length else asked
        logits = TensorInfo(name=LOGITS, dtype="fp16", shape=[1, answers, dims.vocab])
        methods.append(Method(name=name, inputs=inputs, outputs=[logits], states=states))
    return methods


class PackageRunner:
    """Runs a package in the evaluator, in calls as an application makes them."""

    def __init__(self, artifact: Path, threads: int | None, arithmetic: Literal["fp32", "fp16"]) -> None:
        from mobile_export.evaluate.mil import Evaluator

        self.evaluator = Evaluator(open_package(artifact), arithmetic, threads)
        self.tap: Any = None
        """Called with every op's value: an `evaluate.ranges.Ranges`, or None."""
        self.flexible = FLEXIBLE in self.evaluator.functions
        whole = FLEXIBLE if self.flexible else "prefill"
        self.vocab = int(self.evaluator.outputs(whole)[LOGITS].shape[-1] or 0)
        self.context = int(self.evaluator.states(whole)[STATES[0]].shape[2] or 0)
        self.chunk = int(self.evaluator.inputs(whole)["tokens"].shape[1] or self.context)
        self.reset()

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]. Without `prefill_all`, token by token."""
        import numpy as np

        chunked = self.flexible or "prefill_all" in self.evaluator.functions
        parts = self._parts(tokens, start, chunked=chunked)
        return np.concatenate([self._call(part, at, every=True) for part, at in parts])

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]."""
        *before, (part, at) = self._parts(tokens, start, chunked=True)
        for earlier, begin in before:
            self._call(earlier, begin, every=False)
        return self._call(part, at, every=False)[-1]

    def reset(self) -> None:
        """A new, empty state."""
        self.state = self.evaluator.make_state()

    def _parts(self, tokens: Sequence[int], start: int, *, chunked: bool) -> list[tuple[list[int], int]]:
        """Chunks and where each starts; one that would pass the cache's end goes token by token."""
        parts, at = [], 0
        while at < len(tokens):
            fits = self.flexible or start + at + self.chunk <= self.context
            part = list(tokens[at : at + (self.chunk if chunked and fits else 1)])
            parts.append((part, start + at))
            at += len(part)
        return parts

    def _call(self, part: list[int], at: int, *, every: bool) -> np.ndarray:
        """fp32 [S or 1, vocab]. A chunk is padded: what that writes is overwritten before anyone reads it."""
        asked = list(range(len(part))) if every else [len(part) - 1]
        if self.flexible:
            return self._run(FLEXIBLE, tokens=[part], start=[at], last=asked)
        if len(part) == 1:
            return self._run("decode", tokens=[part], start=[at])
        padded = part + [0] * (self.chunk - len(part))
        if every:
            return self._run("prefill_all", tokens=[padded], start=[at])[: len(part)]
        return self._run("prefill", tokens=[padded], start=[at], last=asked)

    def _run(self, function: str, **inputs: Any) -> np.ndarray:
        import numpy as np

        arrays = {name: np.array(value, np.int32) for name, value in inputs.items()}
        return self.evaluator.run(function, arrays, self.state, self.tap)[LOGITS][0]


def open(  # noqa: A001
    artifact: Path, threads: int | None = None, arithmetic: Literal["fp32", "fp16"] = "fp16"
) -> PackageRunner:
    """A runner over a package; fp16, every op's result rounded as it is stored, is nearest to a device."""
    return PackageRunner(artifact, threads, arithmetic)
