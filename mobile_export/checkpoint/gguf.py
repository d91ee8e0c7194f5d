"""A GGUF file becomes a transformers folder: weights in fp32, tokenizer and configs from its metadata."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.checkpoint import Progress, cache, folder, gguf_tensors, gguf_tokenizer
from mobile_export.checkpoint.families import Shape, tensor_shapes, write_configs
from mobile_export.checkpoint.gguf_file import GET_AGAIN, Metadata, check_header, read
from mobile_export.checkpoint.weights import write_fp32
from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.types import Checkpoint

if TYPE_CHECKING:
    from gguf import GGUFReader

VERSION = 1
"""Raise it when the same GGUF gives other bytes: cached folders carry it in their name."""


def resolve(file: Path, say: Progress) -> Checkpoint:
    """The checkpoint in a GGUF file of the user's, converted into the cache."""
    check_header(file)
    sha256 = sha256_file(file)
    path = converted(sha256, lambda: file, say)
    return Checkpoint(
        name=folder.safe_name(file.stem),
        spec=file.name,
        folder=path,
        family=folder.validate(path),
        digest=folder.digest(path),
        license=folder.license_of(path),
        provenance={"kind": "gguf", "sha256": sha256, "converter": VERSION},
    )


def converted(sha256: str, file: Callable[[], Path], say: Progress) -> Path:
    """The transformers folder of the GGUF with this sha256; `file` gets it when it is not cached."""
    path = cache.checkpoints() / f"gguf-{sha256[:16]}-v{VERSION}"
    if path.is_dir() and folder.intact(path):
        return path
    source = file()
    return cache.build(path, folder.intact, lambda empty: convert(source, empty, say))


def convert(file: Path, out: Path, say: Progress) -> None:
    """Write the transformers folder of a GGUF file into the empty folder `out`.

    Raises ExportError for a damaged file, an unknown architecture, quantization or tokenizer.
    """
    start = time.monotonic()
    say(f"reading {file.name}")
    reader = read(file)
    metadata = Metadata(reader)
    shape = _shape(metadata, reader)
    shapes = tensor_shapes(shape)
    say(f"dequantising {len(shapes)} tensors to fp32")
    write_fp32(out / "model.safetensors", shapes, gguf_tensors.tensors(reader, shape, shapes))
    ids = gguf_tokenizer.write(metadata, out, shape)
    write_configs(out, shape, bos=ids.bos, eos=ids.eos, pad=ids.pad)
    licence = metadata.get("general.license", str)
    if licence:
        (out / "README.md").write_text(f"---\nlicense: {licence}\n---\n", "utf-8")
    folder.seal(out)
    say(f"converted {file.name} in {time.monotonic() - start:.0f} s")


def _shape(metadata: Metadata, reader: GGUFReader) -> Shape:
    family = metadata.need("general.architecture", str)
    folder.check_family(family)
    scaling = metadata.get(f"{family}.rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise ExportError(f"the GGUF scales its rope ({scaling})", "use a model without rope scaling")

    def number(key: str) -> int:
        return metadata.need(f"{family}.{key}", int)

    heads, hidden, layers = number("attention.head_count"), number("embedding_length"), number("block_count")
    sizes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    if heads < 1 or layers > len(sizes) or len(sizes.get("token_embd.weight", [])) != 2:
        raise ExportError("the GGUF lacks layers, heads or an embedding", GET_AGAIN)
    shape = Shape(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=number("feed_forward_length"),
        heads=heads,
        kv_heads=metadata.get(f"{family}.attention.head_count_kv", int) or heads,
        head_dim=metadata.get(f"{family}.attention.key_length", int) or hidden // heads,
        vocab=sizes["token_embd.weight"][1],
        context=number("context_length"),
        rope_theta=metadata.get(f"{family}.rope.freq_base", float) or 10000.0,
        # The file rounds 1e-6 to fp32: the shortest decimal that rounds there is what the authors wrote.
        eps=_shortest(metadata.need(f"{family}.attention.layer_norm_rms_epsilon", float)),
        tied=gguf_tensors.tied(reader),
    )
    sound = isfinite(shape.rope_theta) and isfinite(shape.eps) and min(shape.context, shape.head_dim) > 0
    if not sound or shape.head_dim % 2 or shape.heads % shape.kv_heads:
        raise ExportError("the GGUF's sizes do not fit together", GET_AGAIN)
    return shape


def _shortest(value: float) -> float:
    import numpy as np

    return float(str(np.float32(value)))
