"""A checkpoint's tokenizer as a bundle's files, patched for the ExecuTorch runner too; a chat's ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle, Draft
    from mobile_export.types import Checkpoint

NAMES = ("tokenizer.json", "tokenizer_runner.json", "tokenizer_config.json", "chat_template.jinja")


def write_tokenizers(checkpoint: Checkpoint, draft: Draft) -> Literal["NFC", "none"]:
    """Write the tokenizer's files into a bundle; returns what the caller must do to text itself.

    `tokenizer.json` and `tokenizer_config.json` are the checkpoint's own, byte for byte; the chat
    template is a file of its own wherever the checkpoint keeps it. Raises ExportError when the
    ExecuTorch runner could not tokenize alike.
    """
    source = (checkpoint.folder / "tokenizer.json").read_bytes()
    patched, normalize = for_runner(source)
    draft.path("tokenizer.json", "tokenizer").write_bytes(source)
    draft.path("tokenizer_runner.json", "tokenizer-runner").write_bytes(patched)
    config = checkpoint.folder / "tokenizer_config.json"
    if config.is_file():
        draft.path("tokenizer_config.json", "tokenizer-config").write_bytes(config.read_bytes())
    template: Any = checkpoint.tokenizer().chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        draft.path("chat_template.jinja", "chat-template").write_text(template, "utf-8")
    return normalize


def chat_ids(bundle: Bundle, prompt: str, system: str | None = None) -> list[int]:
    """Ids of a bundle's chat template over one user turn, ready for the answer."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer")))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = PreTrainedTokenizerFast(tokenizer_object=tokenizer).apply_chat_template(
        messages,
        chat_template=bundle.path("chat-template").read_text("utf-8"),
        tokenize=False,
        add_generation_prompt=True,
    )
    return list(tokenizer.encode(str(text), add_special_tokens=False).ids)


def for_runner(tokenizer: bytes) -> tuple[bytes, Literal["NFC", "none"]]:
    """tokenizer.json without its normalizer, and the normalization that the caller then does.

    pytorch-tokenizers' own NFC drops accents. With the normalizer gone and NFC applied before, its
    ids equal Hugging Face's for byte-level BPE; other normalizers have no form a caller can apply.
    """
    table = json.loads(tokenizer)
    kinds = _kinds(table.get("normalizer"))
    if kinds - {"NFC"}:
        names = ", ".join(sorted(kinds - {"NFC"}))
        raise ExportError(
            f"the tokenizer normalizes text with {names}, which the ExecuTorch runner does differently",
            "use a model with a byte-level BPE tokenizer, as Qwen2, Qwen3 and Llama 3 have",
        )
    table["normalizer"] = None
    # Compact, in the order it came: a vocabulary's order is its ids'.
    patched = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    return patched, "NFC" if kinds else "none"


def _kinds(normalizer: dict[str, Any] | None) -> set[str]:
    if normalizer is None:
        return set()
    if normalizer.get("type") == "Sequence":
        return set().union(*(_kinds(part) for part in normalizer.get("normalizers", [])))
    return {str(normalizer.get("type"))}
