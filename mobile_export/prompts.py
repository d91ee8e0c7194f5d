"""The committed prompt set: TOML in, what the tokenizer is given out."""

from __future__ import annotations

import hashlib
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from mobile_export.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plain `text`, or the `messages` of a chat: exactly one of them."""

    name: str
    kind: Literal["code", "english", "chinese", "chat", "long", "emoji", "mixed"]
    short: bool = False
    text: str | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Prompts:
    """A prompt set and the sha256 of its file."""

    items: tuple[Prompt, ...]
    sha256: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: tuple[Prompt, ...]


def golden_folder() -> Path:
    """The folder of the committed prompt set and goldens: beside the package, or in it once installed."""
    package = Path(__file__).parent
    installed = package / "_golden"
    return installed if installed.is_dir() else package.parent / "golden"


def load_prompts(path: Path | None = None) -> Prompts:
    """Read a prompt set; None is the committed one. ExportError: unreadable, or not a prompt set."""
    path = path or golden_folder() / "prompts.toml"
    try:
        data = path.read_bytes()
        items = msgspec.convert(tomllib.loads(data.decode("utf-8")), _File).prompt
    except OSError as error:
        raise ExportError(f"cannot read prompts '{path.name}': {error.strerror}", "check the file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ExportError(f"prompts '{path.name}': {error}", "correct the file") from None
    for prompt in items:
        if not (prompt.text or prompt.messages) or (prompt.text and prompt.messages):
            raise ExportError(f"prompt '{prompt.name}' needs either text or messages", "give one of them")
    twice = [name for name, count in Counter(prompt.name for prompt in items).items() if count > 1]
    if twice or not items:
        raise ExportError(f"prompts '{path.name}': {twice or 'no prompt'}", "give each prompt its own name")
    return Prompts(items, hashlib.sha256(data).hexdigest())


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[int]]:
    """The text a tokenizer is given and its ids; a chat goes through the model's own template."""
    if prompt.text is not None:
        return prompt.text, list(tokenizer(prompt.text)["input_ids"])
    messages = [msgspec.structs.asdict(message) for message in prompt.messages or ()]
    if tokenizer.chat_template is None:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return text, list(tokenizer(text)["input_ids"])
    # Some templates write today's date, and a golden must not change with the day.
    text = str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="1 January 2026"
        )
    )
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])
