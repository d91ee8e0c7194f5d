"""Byte-level BPE tokenizers as files: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_export.checkpoint.families import write_json

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from tokenizers.processors import PostProcessor

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Words:
    """A tokenizer's data."""

    tokens: Mapping[str, int]
    """Tokens in the byte-level alphabet, with their ids."""
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, int]
    """Tokens found before anything else and hidden when decoding, with their ids."""
    added: Mapping[str, int]
    """Tokens found before anything else, but part of the text."""
    split: str
    """How text is cut before merging: a key of SPLITS."""
    bos: str | None
    eos: str | None
    pad: str | None
    add_bos: bool = False


# Each is what the model's authors trained with; a wrong one changes ids silently.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = ("gpt-2", "llama-bpe", "qwen2", "smollm")


def save(folder: Path, words: Words, *, context: int, template: str | None) -> None:
    """Write the tokenizer's files into `folder`; `template` is the chat template (Jinja)."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocab = {**words.tokens, **words.special, **words.added}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=list(words.merges)))
    if words.split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(words.split)
    tokenizer.decoder = decoders.ByteLevel()
    both = [(i, token, True) for token, i in words.special.items()]
    both += [(i, token, False) for token, i in words.added.items()]
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for _, token, special in sorted(both)]
    )
    if words.add_bos and words.bos:
        tokenizer.post_processor = _prepend(words.bos, vocab[words.bos])
    # tokenizer.save() would hide why a write failed.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    write_json(folder / "tokenizer_config.json", _config(words, context))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")


def _config(words: Words, context: int) -> dict[str, object]:
    return {
        "add_bos_token": words.add_bos,
        "add_prefix_space": False,
        "bos_token": words.bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": words.eos,
        "errors": "replace",
        "model_max_length": context,
        "pad_token": words.pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _pre_tokenizer(split: str) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if split == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if split == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    pattern = Regex(_QWEN2 if split == "qwen2" else _LLAMA3)
    return Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _prepend(bos: str, id_: int) -> PostProcessor:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, id_)])
