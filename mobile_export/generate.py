"""Answers from a bundle, by its own tokenizer, chat template and artefact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.targets import target
from mobile_export.tokenizers_io import chat_ids

if TYPE_CHECKING:
    import numpy as np


def generate(
    bundle: Bundle,
    prompt: str,
    *,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int = 1,
) -> Iterator[str]:
    """Yield the answer in pieces of text as they come.

    The prompt is one user turn of the bundle's chat template, or with `raw` the text itself.
    temperature 0 takes the most likely token. Ends at an end-of-text id, after `max_tokens`, or
    when the cache is full. Raises ExportError when the prompt leaves no room for an answer.
    """
    import numpy as np
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer")))
    tokens = tokenizer.encode(prompt).ids if raw else chat_ids(bundle, prompt, system)
    runner = target(bundle.manifest.target).open(bundle.path("program"), threads=threads)
    room = runner.context - len(tokens)
    if room < 1 or not tokens:
        raise ExportError(
            f"the prompt has {len(tokens)} tokens, and the bundle's context is {runner.context}",
            "shorten the prompt, or export with a larger --context",
        )
    ends, random = set(bundle.manifest.io.eos_ids), np.random.default_rng(seed)
    text = DecodeStream(skip_special_tokens=True)
    position = 0
    for _ in range(min(max_tokens, room)):
        token = _pick(runner.last_logits(tokens, position), temperature, random)
        if token in ends:
            return
        position += len(tokens)
        tokens = [token]
        if piece := text.step(tokenizer, token):
            yield piece


def _pick(logits: np.ndarray, temperature: float, random: Any) -> int:
    import numpy as np

    if temperature <= 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(random.choice(len(weights), p=weights / weights.sum()))
