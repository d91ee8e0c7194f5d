"""ONNX: the program as a model for stock ONNX Runtime, on Android, iOS and here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export.manifest import Contract, Method, Runtime, TensorInfo
from mobile_export.targets import Lowered
from mobile_export.targets.onnx_deploy import (
    GENAI_CONFIG,
    GENAI_MODEL,
    OPERATORS,
    cpu_features,
    genai_config,
    genai_model,
    required_operators,
)
from mobile_export.targets.onnx_file import ModelFile, data_file
from mobile_export.targets.onnx_graph import build
from mobile_export.targets.onnx_io import LOGITS, MASK, PAST, PRESENT, READ, TOKENS, cache_names
from mobile_export.targets.onnx_weights import METADATA, metadata
from mobile_export.types import Checkpoint, Dims, Program

if TYPE_CHECKING:
    import numpy as np

    from mobile_export.bundle import Draft
    from mobile_export.recipe import ONNX as Options
    from mobile_export.recipe import Recipe

CHUNK = 128
"""Tokens in one call, at most: what a call needs beside the weights grows with them, its speed hardly."""

LEAST_RUNTIME = {"fp32": "1.23.2", "fp16": "1.32.0"}
"""By the cache's type, the oldest version that ran our exports; 1.22.1 refused them, or their attention."""


def write(program: Program, recipe: Recipe, checkpoint: Checkpoint, draft: Draft) -> Lowered:
    """Write `model.onnx` and its data file into a bundle and say what they need and how they are called."""
    from mobile_export.checkpoint.load import eos_ids

    artifact = draft.path("model.onnx", "program")
    draft.path(data_file(artifact).name, "program")
    lower(program, recipe.onnx, artifact)
    ends, begin = eos_ids(checkpoint), checkpoint.tokenizer().bos_token_id
    _deploy(program.dims, recipe.onnx, checkpoint, draft, artifact, ends)
    level = recipe.onnx.accuracy_level if recipe.quantize.weights != "fp32" else 0
    runtime = Runtime(
        name="ONNX Runtime",
        minimum_version=LEAST_RUNTIME[recipe.onnx.kv_cache],
        cpu_features=cpu_features(level),
        notes=[
            "present.* may be the buffers of past_key_values.*: then nothing is copied from call to call.",
            f"Products take {'int8' if level else 'fp32'} activations.",
            f"{OPERATORS} is for a reduced build of the runtime; {GENAI_CONFIG} for onnxruntime-genai.",
        ],
    )
    io = Contract(
        methods=[_method(program.dims, recipe.onnx)],
        constant_methods={},
        context=program.dims.context,
        vocab=program.dims.vocab,
        kv_cache=recipe.onnx.kv_cache,
        eos_ids=ends,
        bos_id=begin,
        normalize="none",
    )
    return Lowered(artifact, runtime, io, ("onnx", "onnxruntime"))


def _deploy(
    dims: Dims, options: Options, checkpoint: Checkpoint, draft: Draft, artifact: Path, ends: list[int]
) -> None:
    """What stands beside the model for those who ship it."""
    from mobile_export.targets.onnx_ort import to_ort

    tokenizer = checkpoint.tokenizer()
    draft.path(OPERATORS, "runtime-config").write_text(required_operators(artifact), "utf-8")
    genai_model(artifact, draft.path(GENAI_MODEL, "runtime-config"))
    config = genai_config(
        dims,
        family=checkpoint.family,
        eos_ids=ends,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        chunk=CHUNK,
    )
    draft.path(GENAI_CONFIG, "runtime-config").write_bytes(config)
    if options.ort:
        to_ort(artifact, draft.path("model.ort", "runtime-config"))


def lower(program: Program, options: Options, out: Path) -> None:
    """Write the `.onnx` and, beside it, the `.onnx.data` that it names."""
    with ModelFile(out) as file:
        codes = build(program, options, file)
        file.save({METADATA: metadata(codes), "context": program.dims.context, "vocab": program.dims.vocab})


def _method(dims: Dims, options: Options) -> Method:
    def caches(prefix: str, length: str) -> list[TensorInfo]:
        shape: list[int | str] = [1, dims.kv_heads, f"{length}<={dims.context}", dims.head_dim]
        names = cache_names(dims, prefix)
        return [TensorInfo(name=name, dtype=options.kv_cache, shape=shape) for name in names]

    length, total, read = (f"{name}<={dims.context}" for name in ("length", "total", "read"))
    return Method(
        name="main",
        inputs=[
            TensorInfo(name=TOKENS, dtype="int64", shape=[1, length]),
            TensorInfo(name=MASK, dtype="int64", shape=[1, total]),
            *caches(PAST, "past"),
            TensorInfo(name=READ, dtype="int64", shape=[read]),
        ],
        outputs=[
            TensorInfo(name=LOGITS, dtype="fp32", shape=[1, read, dims.vocab]),
            *caches(PRESENT, "present"),
        ],
    )


class OnnxRunner:
    """Runs a `.onnx` in ONNX Runtime; the KV cache is one buffer a layer, written in place."""

    def __init__(
        self,
        artifact: Path,
        *,
        threads: int = 1,
        entries: dict[str, str] | None = None,
        profile: bool = False,
    ) -> None:
        import numpy as np

        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = profile
        for key, value in (entries or {}).items():
            if hasattr(options, key):
                setattr(options, key, bool(int(value)))
            else:
                options.add_session_config_entry(key, value)
        self.session = ort.InferenceSession(str(artifact), options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.context, self.vocab = int(metadata["context"]), int(metadata["vocab"])
        self.caches: dict[str, np.ndarray] = {}
        self.last = np.empty((1, 1, self.vocab), np.float32)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(self.last))
        for value in self.session.get_inputs():
            if value.name.startswith(PAST):
                self._share(value, ort)

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab], the cache updated in place as on a device."""
        for at in range(0, len(tokens), CHUNK):
            for name, array in _given(tokens[at : at + CHUNK], start + at).items():
                self.binding.bind_cpu_input(name, array)
            self.session.run_with_iobinding(self.binding)
        return self.last[0, 0].copy()

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab], by the same nodes; the runtime returns the caches and they are copied back."""
        import numpy as np

        parts = range(0, len(tokens), CHUNK)
        return np.concatenate([self._every(tokens[at : at + CHUNK], start + at) for at in parts])

    def reset(self) -> None:
        """Forget the sequence: attention reads only what was written since position 0."""

    def _share(self, value: Any, ort: Any) -> None:
        """Bind one buffer as an input cache and as the output that updates it."""
        import numpy as np

        name = value.name.removeprefix(PAST)
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        self.caches[name] = np.zeros((1, value.shape[1], self.context, value.shape[3]), kind)
        buffer = ort.OrtValue.ortvalue_from_numpy(self.caches[name])
        self.binding.bind_ortvalue_input(PAST + name, buffer)
        self.binding.bind_ortvalue_output(PRESENT + name, buffer)

    def _every(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Bound buffers and an input with a default exclude one another, so that this run binds nothing."""
        import numpy as np

        given = {**_given(tokens, start), READ: np.arange(len(tokens))}
        given |= {PAST + name: cache[:, :, :start] for name, cache in self.caches.items()}
        logits, *presents = self.session.run([LOGITS, *(PRESENT + name for name in self.caches)], given)
        for cache, present in zip(self.caches.values(), presents, strict=True):
            cache[:, :, start : start + len(tokens)] = present[:, :, start:]
        return logits[0]


def _given(tokens: Sequence[int], start: int) -> dict[str, np.ndarray]:
    import numpy as np

    return {TOKENS: np.array([tokens], np.int64), MASK: np.ones((1, start + len(tokens)), np.int64)}


def runtime() -> Any:
    """onnxruntime, its telemetry off: since 1.29 it reports unless told not to before it loads."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def open(artifact: Path, *, threads: int = 1) -> OnnxRunner:  # noqa: A001
    """A runner over the `.onnx` with that many threads."""
    return OnnxRunner(artifact, threads=threads)
