"""A checkpoint's folder becomes a torch model and a tokenizer. Nothing else is read; no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mobile_export.checkpoint.folder import read_json
from mobile_export.errors import ExportError
from mobile_export.types import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TASK = "text-generation-with-past"


def load_model(checkpoint: Checkpoint, *, attention: str = "eager") -> PreTrainedModel:
    """The fp32 model in eval mode, tied weights tied, all parameters from safetensors.

    `attention` is a name in transformers' AttentionInterface. Task and class come from optimum's
    TasksManager. Raises ExportError when weights are damaged, missing, left over or misshapen.
    """
    import torch

    _quiet()
    with _blame("model", checkpoint):
        model, info = model_class(checkpoint.family).from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the check below can name them
            output_loading_info=True,
        )
    _check_loading(checkpoint, info)
    model = model.eval().requires_grad_(False)
    if model.config.tie_word_embeddings:
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as tokenizer.json has it (what a device reads too), with its chat template."""
    from transformers import PreTrainedTokenizerFast

    with _blame("tokenizer", checkpoint):
        return PreTrainedTokenizerFast.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )


def eos_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end an answer, the main one first: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        if (checkpoint.folder / name).is_file():
            found = read_json(checkpoint.folder, name).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [int(found)]
    return []


def model_class(family: str) -> Any:
    """The transformers class that optimum gives for text generation with a KV cache."""
    from optimum.exporters.tasks import TasksManager

    return TasksManager.get_model_class_for_task(
        TASK, framework="pt", model_type=family, library="transformers"
    )


@contextmanager
def _blame(part: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Files that are not what they say make transformers raise anything at all: all are the model's fault."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].replace(str(checkpoint.folder), checkpoint.name)
        message = f"cannot load the {part} of '{checkpoint.name}': {type(error).__name__}: {reason}"
        raise ExportError(message, "the model is damaged: get it again") from error


def _check_loading(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    for word in ("mismatched", "missing", "unexpected"):
        if keys := info[f"{word}_keys"]:
            first = sorted(key if isinstance(key, str) else key[0] for key in keys)[0]
            message = f"'{checkpoint.name}' has {len(keys)} {word} weights, e.g. {first}"
            raise ExportError(
                message, "config.json and the weights do not belong together: get the model again"
            )


def _quiet() -> None:
    """No progress bars, and no warnings about GPU kernels that a CPU machine does not have."""
    import logging

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
