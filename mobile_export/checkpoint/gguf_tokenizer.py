"""The tokenizer in a GGUF's metadata, written as a transformers tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobile_export.checkpoint import tokenizer
from mobile_export.checkpoint.families import Shape
from mobile_export.checkpoint.gguf_file import GET_AGAIN, Metadata
from mobile_export.errors import ExportError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
"""Tokens that end an answer wherever they are control tokens: a GGUF names only the main one."""
_SPLITS = {"default": "gpt-2", "deepseek-r1-qwen": "qwen2"}
"""Other names for a way of cutting text."""


@dataclass(frozen=True)
class Ids:
    """The ids that generation needs; `eos` has the main one first."""

    bos: int | None
    eos: list[int]
    pad: int | None


def write(metadata: Metadata, out: Path, shape: Shape) -> Ids:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `out`.

    Raises ExportError for a tokenizer that is not byte-level BPE with a known way of cutting text.
    """
    tokens, kinds = _vocabulary(metadata, shape)
    ids = Ids(
        bos=_id(metadata, "bos_token_id", tokens),
        eos=_eos(metadata, tokens, kinds),
        pad=_id(metadata, "padding_token_id", tokens),
    )
    split = _split(metadata)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool)
    if add_bos is None:
        add_bos = split == "llama-bpe"  # Llama 3 files leave it out and mean yes
    used = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    words = tokenizer.Words(
        tokens=used,
        merges=_merges(metadata, used),
        special={token: i for token, i in used.items() if kinds[i] == _CONTROL},
        added={token: i for token, i in used.items() if kinds[i] == _USER_DEFINED},
        split=split,
        # A Qwen model does not add its bos, and its authors' files say it has none.
        bos=tokens[ids.bos] if ids.bos is not None and (add_bos or shape.family == "llama") else None,
        eos=tokens[ids.eos[0]] if ids.eos else None,
        pad=None if ids.pad is None else tokens[ids.pad],
        add_bos=add_bos,
    )
    tokenizer.save(out, words, context=shape.context, template=metadata.get("tokenizer.chat_template", str))
    return ids


def _vocabulary(metadata: Metadata, shape: Shape) -> tuple[list[str], list[int]]:
    tokens = metadata.need("tokenizer.ggml.tokens", list)
    kinds = metadata.need("tokenizer.ggml.token_type", list)
    fits = len(tokens) == len(kinds) and len(set(map(str, tokens))) == len(tokens) <= shape.vocab
    if not fits or not all(isinstance(token, str) for token in tokens):
        raise ExportError("the GGUF's vocabulary does not fit its embedding", GET_AGAIN)
    return tokens, kinds


def _split(metadata: Metadata) -> str:
    model = metadata.need("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ExportError(
            f"the GGUF's tokenizer is of type '{model}'", "use a model with byte-level BPE (gpt2)"
        )
    name = metadata.get("tokenizer.ggml.pre", str) or "default"
    split = _SPLITS.get(name, name)
    if split not in tokenizer.SPLITS:
        known = ", ".join(tokenizer.SPLITS)
        raise ExportError(
            f"the GGUF's tokenizer cuts text by '{name}', which we do not know", f"known: {known}"
        )
    return split


def _merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.need("tokenizer.ggml.merges", list):
        left, _, right = str(merge).partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ExportError("the GGUF's merges do not fit its vocabulary", GET_AGAIN)
        merges.append((left, right))
    return merges


def _id(metadata: Metadata, key: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}", int)
    if value is not None and not 0 <= value < len(tokens):
        raise ExportError(f"the GGUF's '{key}' is not in its vocabulary", GET_AGAIN)
    return value


def _eos(metadata: Metadata, tokens: list[str], kinds: list[int]) -> list[int]:
    named = [_id(metadata, f"{kind}_token_id", tokens) for kind in ("eos", "eot", "eom")]
    control = {token: i for i, token in enumerate(tokens) if kinds[i] == _CONTROL}
    stops = [control[token] for token in _STOPS if token in control]
    return list(dict.fromkeys(i for i in [*named, *stops] if i is not None))
