"""What the fp32 source model says on the prompt set: recorded once, committed, compared with ever after.

A golden is two files: golden.json (prompts, greedy continuations, provenance; made to be read in
a diff) and golden.safetensors (the 64 most likely tokens at every position).

Exactness: on one machine, recording again gives the same bytes, provided `pin_arithmetic` ran
before torch and numpy were imported, at any number of threads. Another kind of CPU or another
torch may round the last bits otherwise; then the files differ, and parity between the two says
by how little.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export.cases import TOP, Case, Observation
from mobile_export.errors import ExportError
from mobile_export.files import write_file
from mobile_export.observe import observe, top_tokens
from mobile_export.parity import greedy_matches
from mobile_export.prompts import Prompt, Prompts, golden_folder, render

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from mobile_export.targets.source import HFRunner
    from mobile_export.types import Checkpoint

SCHEMA = 1
GREEDY = 32
"""Tokens in each greedy continuation."""
_THREADS = 2
# Measured: with these, matrix products are bit-equal from run to run and from 1 to 2 threads;
# MKL_CBWR=COMPATIBLE is not, and is slower.
_PINS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2,STRICT",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
_AGAIN = "run `mobile-export golden record`"
_ARRAYS = ("top_ids", "top_logits", "logsumexp", "next_logprob")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """golden.json."""

    schema: int = SCHEMA
    model: str
    spec: str
    checkpoint: str
    """Digest of the checkpoint."""
    prompts_sha256: str
    arithmetic: str
    versions: dict[str, str]
    vocab: int
    positions: int
    tensors_sha256: str = ""
    """Of golden.safetensors."""
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Golden:
    """A header and what the source said: rows of `observation` follow `header.cases`."""

    header: Header
    observation: Observation

    @property
    def cases(self) -> tuple[Case, ...]:
        """The prompts with their greedy continuations."""
        return self.header.cases

    def subset(self, *, short: bool = False, context: int | None = None) -> Golden:
        """Only the short cases, and of each only what fits `context` positions."""
        import numpy as np

        kept, rows, row = [], [], 0
        for case in self.cases:
            cut = case if context is None else case.within(context)
            if case.short or not short:
                kept.append(cut)
                rows.append(np.arange(row, row + len(cut.inputs)))
            row += len(case.inputs)
        picked = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
        arrays = {name: getattr(self.observation, name)[picked] for name in _ARRAYS}
        header = msgspec.structs.replace(self.header, cases=tuple(kept), positions=len(picked))
        return Golden(header, _observation(arrays))


def pin_arithmetic() -> None:
    """Fix the instruction set of torch's and numpy's kernels; call it before either is imported."""
    os.environ.update(_PINS)


def record(
    checkpoint: Checkpoint, prompts: Prompts, progress: Callable[[str], None] = lambda _: None
) -> Golden:
    """Ask the Hugging Face fp32 model; `progress` gets each prompt's name.

    Prompts longer than the model's context are cut. ExportError: the checkpoint cannot be loaded.
    """
    import tokenizers
    import torch
    import transformers

    from mobile_export.targets.source import HFRunner

    tokenizer, runner = checkpoint.tokenizer(), HFRunner(checkpoint.model())
    with _threads(_THREADS):
        cases, parts = [], []
        for prompt in prompts.items:
            progress(prompt.name)
            cases.append(_continue(prompt, tokenizer, runner))
            parts.append(observe(runner, cases[-1:]))
        arithmetic = _arithmetic()
    header = Header(
        model=checkpoint.name,
        spec=checkpoint.spec,
        checkpoint=checkpoint.digest,
        prompts_sha256=prompts.sha256,
        arithmetic=arithmetic,
        versions={
            "tokenizers": tokenizers.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        vocab=runner.vocab,
        positions=sum(len(case.inputs) for case in cases),
        cases=tuple(cases),
    )
    golden = Golden(header, _join(parts))
    digest = hashlib.sha256(_tensor_bytes(golden.observation)).hexdigest()
    return replace(golden, header=msgspec.structs.replace(header, tensors_sha256=digest))


def save(golden: Golden, folder: Path) -> None:
    """Write golden.safetensors, then golden.json: a reader that meets half of it refuses it."""
    write_file(folder / "golden.safetensors", _tensor_bytes(golden.observation))
    write_file(folder / "golden.json", _json_bytes(golden.header))


def load(folder: Path) -> Golden:
    """Read and check a golden. ExportError: missing, altered, cut short, or of another version."""
    header = _load_header(folder)
    arrays = _load_tensors(folder, header)
    positions, width = sum(len(case.inputs) for case in header.cases), min(TOP, header.vocab)
    shapes = [(positions, width), (positions, width), (positions,), (positions,)]
    if [arrays[name].shape for name in _ARRAYS] != shapes or positions != header.positions:
        raise ExportError(f"golden '{folder.name}' does not hold {positions} positions", _AGAIN)
    if positions and not 0 <= arrays["top_ids"].min() <= arrays["top_ids"].max() < header.vocab:
        raise ExportError(f"golden '{folder.name}' holds ids outside the vocabulary", _AGAIN)
    return Golden(header, _observation(arrays))


def find(checkpoint: Checkpoint, prompts: Prompts, folder: Path | None = None) -> Golden:
    """The golden of a model in `folder` (None: the committed ones).

    ExportError: there is none, or it is of other weights, another vocabulary or other prompts.
    """
    golden = load((folder or golden_folder()) / checkpoint.name)
    if golden.header.checkpoint != checkpoint.digest:
        raise ExportError(f"the golden of '{checkpoint.name}' is of another checkpoint", _AGAIN)
    if golden.header.prompts_sha256 != prompts.sha256:
        raise ExportError(f"the golden of '{checkpoint.name}' is of other prompts", _AGAIN)
    return golden


def selftest(cases: Sequence[Case], observation: Observation) -> dict[str, Any]:
    """What a device checks itself with: small, JSON, from what an artefact (or the source) said.

    For each short case: its text, token ids, the greedy continuation, how much of it the observed
    stage matches, and the 8 most likely ids with their logits at the prompt's last position.
    """
    result, row = [], 0
    for case in cases:
        end = row + len(case.inputs)
        if case.short and case.greedy:
            last = row + len(case.tokens) - 1
            result.append(
                {
                    "name": case.name,
                    "text": case.text,
                    "tokens": list(case.tokens),
                    "greedy": list(case.greedy),
                    "greedy_match": greedy_matches([case], observation.top_ids[row:end, 0])[0],
                    "top_ids": observation.top_ids[last, :8].tolist(),
                    "top_logits": [round(float(value), 4) for value in observation.top_logits[last, :8]],
                }
            )
        row = end
    return {"schema": SCHEMA, "cases": result}


def _continue(prompt: Prompt, tokenizer: PreTrainedTokenizerFast, runner: HFRunner) -> Case:
    text, tokens = render(prompt, tokenizer)
    tokens = tokens[: max(runner.context - GREEDY, 1)]
    if not tokens:
        raise ExportError(f"prompt '{prompt.name}' has no token", "correct the prompt")
    runner.reset()
    row, greedy = runner.last_logits(tokens, 0), []
    while True:
        greedy.append(int(top_tokens(row, 1)[0]))
        if len(greedy) == GREEDY:
            break
        row = runner.last_logits(greedy[-1:], len(tokens) + len(greedy) - 1)
    return Case(
        name=prompt.name,
        kind=prompt.kind,
        short=prompt.short,
        text=text,
        tokens=tuple(tokens),
        greedy=tuple(greedy),
        greedy_text=str(tokenizer.decode(greedy)),
    )


def _join(parts: Sequence[Observation]) -> Observation:
    import numpy as np

    return _observation({name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS})


def _observation(arrays: Mapping[str, np.ndarray]) -> Observation:
    return Observation(
        top_ids=arrays["top_ids"],
        top_logits=arrays["top_logits"],
        logsumexp=arrays["logsumexp"],
        next_logprob=arrays["next_logprob"],
    )


def _tensor_bytes(observation: Observation) -> bytes:
    from safetensors.numpy import save as save_tensors

    return save_tensors({name: getattr(observation, name) for name in _ARRAYS})


def _json_bytes(header: Header) -> bytes:
    """Indented, but each list of numbers on one line: a changed prompt is a changed line."""
    text = msgspec.json.format(msgspec.json.encode(header), indent=1).decode()
    # A JSON string holds no raw newline, so this cannot reach into a text.
    lists = re.compile(r"\[\n[-\d,\s]+\]")
    return lists.sub(lambda found: "".join(found[0].split()), text).encode() + b"\n"


def _load_header(folder: Path) -> Header:
    try:
        data = (folder / "golden.json").read_bytes()
    except FileNotFoundError:
        raise ExportError(f"there is no golden '{folder.name}'", _AGAIN) from None
    try:
        schema = msgspec.json.decode(data, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise ExportError(f"golden '{folder.name}' has schema {schema}, not {SCHEMA}", _AGAIN)
        return msgspec.json.decode(data, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"golden '{folder.name}': {error}", _AGAIN) from None


def _load_tensors(folder: Path, header: Header) -> dict[str, np.ndarray]:
    from safetensors.numpy import load as load_tensors

    try:
        data = (folder / "golden.safetensors").read_bytes()
    except FileNotFoundError:
        raise ExportError(f"golden '{folder.name}' has lost its golden.safetensors", _AGAIN) from None
    if hashlib.sha256(data).hexdigest() != header.tensors_sha256:
        raise ExportError(f"golden '{folder.name}' was altered or cut short", _AGAIN)
    arrays: dict[str, np.ndarray] = load_tensors(data)
    return arrays


def _arithmetic() -> str:
    import torch

    pinned = all(os.environ.get(name) == value for name, value in _PINS.items())
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"fp32, {kernels}, {torch.get_num_threads()} threads, {'pinned' if pinned else 'not pinned'}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
