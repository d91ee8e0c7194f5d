"""Small seeded random models, for development and tests in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.checkpoint import cache, folder, tokenizer
from mobile_export.checkpoint.families import Shape, tensor_shapes, write_configs
from mobile_export.checkpoint.weights import write_fp32
from mobile_export.errors import ExportError, nearest
from mobile_export.types import Checkpoint

if TYPE_CHECKING:
    import numpy as np

PREFIX = "sandbox:"
VERSION = 2
"""Raise it when the same spec gives other bytes: cached folders carry it in their name."""
_DEFAULTS = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 0,
    "vocab": 512,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 0,
    "context": 4096,
    "tied": 1,
    "seed": 0,
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def resolve(spec: str) -> Checkpoint:
    """The random model of a spec such as `sandbox:qwen2?layers=2&hidden=64&vocab=512`.

    Options, all whole numbers: layers, hidden, intermediate, vocab, heads, kv_heads, head_dim,
    context, tied (0 or 1), seed. The same spec gives the same bytes.
    """
    shape, seed = parse(spec)
    name = _name(shape, seed)
    path = cache.checkpoints() / f"{name}-v{VERSION}"
    cache.build(path, folder.intact, lambda empty: _write(empty, shape, seed))
    return Checkpoint(
        name=name,
        spec=spec,
        folder=path,
        family=folder.validate(path),
        digest=folder.digest(path),
        license="CC0-1.0",
        provenance={"kind": "sandbox", "seed": seed, "version": VERSION},
    )


def parse(spec: str) -> tuple[Shape, int]:
    """Shape and seed of a sandbox spec; ExportError names a wrong option."""
    family, _, query = spec.removeprefix(PREFIX).partition("?")
    folder.check_family(family)
    options = dict(_DEFAULTS)
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in options:
            raise ExportError(f"unknown sandbox option '{key}'", nearest(key, options))
        if not value.isdecimal() or len(value) > 9:
            raise ExportError(f"sandbox option '{key}' is '{value}'", "give a whole number")
        options[key] = int(value)
    # Qwen3's heads are wider than hidden / heads: keep that in the small model.
    head_dim = options["head_dim"] or (2 if family == "qwen3" else 1) * options["hidden"] // max(
        options["heads"], 1
    )
    shape = Shape(
        family=family,
        layers=options["layers"],
        hidden=options["hidden"],
        intermediate=options["intermediate"] or 3 * options["hidden"],
        heads=options["heads"],
        kv_heads=options["kv_heads"],
        head_dim=head_dim,
        vocab=options["vocab"],
        context=options["context"],
        rope_theta=10000.0,
        eps=1e-6,
        tied=bool(options["tied"]),
    )
    _check(shape)
    return shape, options["seed"]


def _check(shape: Shape) -> None:
    if min(shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.context) < 1:
        raise ExportError(
            "a sandbox size is 0", "give layers, hidden, heads, kv_heads and context of 1 or more"
        )
    if shape.vocab < 260:
        raise ExportError(
            f"sandbox vocab {shape.vocab} is too small", "give 260 or more: 256 bytes and 3 specials"
        )
    if shape.heads % shape.kv_heads:
        raise ExportError(
            f"{shape.heads} heads do not divide among {shape.kv_heads}", "make heads a multiple of kv_heads"
        )
    if shape.head_dim % 2 or (shape.family == "qwen2" and shape.head_dim * shape.heads != shape.hidden):
        raise ExportError(
            f"hidden {shape.hidden} does not fit {shape.heads} heads", "give a multiple of 2 * heads"
        )


def _name(shape: Shape, seed: int) -> str:
    key = hashlib.sha256(repr((shape, seed)).encode()).hexdigest()[:8]
    return f"sandbox-{shape.family}-{shape.layers}x{shape.hidden}-{shape.vocab}-{key}"


def _write(path: Path, shape: Shape, seed: int) -> None:
    shapes = tensor_shapes(shape)
    write_fp32(path / "model.safetensors", shapes, _random(shapes, seed))
    words = _words(shape.vocab)
    end, start_, stop = (words.special[token] for token in _SPECIAL)
    write_configs(path, shape, bos=end, eos=[stop, end], pad=end)
    tokenizer.save(path, words, context=shape.context, template=tokenizer.CHATML)
    folder.seal(path)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Weights large enough that logits differ, norms near 1, biases far from 0."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            scale = 0.25 if "embed" in name or "lm_head" in name else 2.0 * shape[1] ** -0.5
            yield name, values * np.float32(scale)
        else:
            yield name, values * np.float32(0.1) + np.float32(0.0 if name.endswith("bias") else 1.0)


def _words(size: int) -> tokenizer.Words:
    """A byte-level vocabulary of `size` ids (fewer past 65,795: then the model's is padded, as Qwen's is).

    Merges join two letters, then any two bytes, so that text is shorter than its bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    letters = ["Ġ", *"etaoinshrdlucmfwygpbvkxqjz"]
    pairs = dict.fromkeys([*product(letters, letters[1:]), *product(alphabet, alphabet)])
    merges = list(islice(pairs, size - len(alphabet) - len(_SPECIAL)))
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {token: len(tokens) + i for i, token in enumerate(_SPECIAL)}
    end = _SPECIAL[0]
    return tokenizer.Words(vocab, merges, special, {}, "qwen2", bos=None, eos=_SPECIAL[2], pad=end)
