"""Trace: a transformers model becomes one pure program in our dialect.

transformers' own modelling code is traced, so a new family needs no code here: its attention and
cache are ours through `AttentionInterface` and a small `Cache`; norms and rotary are swapped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mobile_export.errors import ExportError
from mobile_export.types import Checkpoint, Dims, Program, sample_inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from mobile_export.recipe import Recipe

ATTENTION = "mobile_export"


class Trace:
    """Checkpoint -> fp32 Program, sequence length dynamic."""

    name = "trace"
    reads = ("context",)

    def run(self, checkpoint: Checkpoint, recipe: Recipe) -> Program:
        """Trace the model with `recipe.context` cache positions."""
        model = checkpoint.model()
        dims = dims_of(model, recipe.context)
        return Program(trace(model, dims), dims, (self.name,))

    def check(self, program: Program, recipe: Recipe) -> None:
        """Every attention, norm and cache update is an op of the dialect; nothing reads a mask."""
        counts = op_counts(program.exported)
        layers = program.dims.layers
        for op, expected in (("attention", layers), ("update_cache", 2 * layers), ("rotary", 2 * layers)):
            if counts.get(f"mobile.{op}", 0) != expected:
                found = counts.get(f"mobile.{op}", 0)
                raise ExportError(
                    f"the traced program has {found} mobile::{op}, not {expected}",
                    "this architecture's attention is not supported: use a Qwen2, Qwen3 or Llama model",
                )
        if counts.get("mobile.rms_norm", 0) < 2 * layers + 1:
            raise ExportError("a norm was not traced as mobile::rms_norm", "report the model's name to us")
        if any(name.startswith("aten.scaled_dot_product") for name in counts):
            raise ExportError("an attention escaped the dialect", "report the model's name to us")


def dims_of(model: PreTrainedModel, context: int) -> Dims:
    """Sizes from the model's config; a context past the model's own is refused."""
    config: Any = model.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ExportError(
            "this model has layers with sliding or linear attention", "use one with full attention only"
        )
    if context > config.max_position_embeddings:
        raise ExportError(
            f"context {context} is past the model's {config.max_position_embeddings}",
            f"use --context {config.max_position_embeddings} or less",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Dims(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=context,
    )


def trace(model: PreTrainedModel, dims: Dims) -> ExportedProgram:
    """The model as an ExportedProgram of the signature that `types.Program` documents."""
    import torch

    inputs, shapes = sample_inputs(dims)
    with _dialect_in(model), torch.no_grad():
        return torch.export.export(_pure(model), inputs, dynamic_shapes=shapes, strict=False)


def op_counts(exported: ExportedProgram) -> dict[str, int]:
    """How often each operator is called, by `namespace.name`."""
    counts: dict[str, int] = {}
    for node in exported.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            name = str(node.target).removesuffix(".default")
            counts[name] = counts.get(name, 0) + 1
    return counts


def _pure(model: PreTrainedModel) -> torch.nn.Module:
    import torch
    from transformers.cache_utils import Cache

    class PureCache(Cache):
        """Caches in, updated caches out; `update` returns the whole cache, as our attention reads it."""

        def __init__(self, caches: tuple[Tensor, ...], start: Tensor) -> None:
            super().__init__(layers=[])
            self.caches, self.start = list(caches), start

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            first = 2 * layer_idx
            for index, new in ((first, key_states), (first + 1, value_states)):
                self.caches[index] = torch.ops.mobile.update_cache(self.caches[index], new, self.start)
            return self.caches[first], self.caches[first + 1]

    class Pure(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.get_decoder(), model.get_output_embeddings()

        def forward(self, tokens: Tensor, start: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            cache = PureCache(caches, start)
            positions = (start + torch.arange(tokens.shape[1])).unsqueeze(0)
            hidden = self.backbone(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                start=start,
            ).last_hidden_state
            return (self.head(hidden), *cache.caches)

    return Pure().eval()


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, start: Tensor, **_: Any
) -> tuple[Tensor, None]:
    import torch

    return torch.ops.mobile.attention(q, k, v, start, scaling).transpose(1, 2), None


@contextmanager
def _dialect_in(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's norms, rotary and attention call our operators."""
    import torch
    from transformers import AttentionInterface

    from mobile_export import dialect

    AttentionInterface.register(ATTENTION, _attention)  # without a mask function, no mask is made

    class Norm(torch.nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.mobile.rms_norm(x, self.weight, self.eps)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.mobile.rotary(q, cos, sin), torch.ops.mobile.rotary(k, cos, sin)

    assert dialect.rotary is not None  # importing it registered the operators
    norms = [(name, part) for name, part in model.named_modules() if type(part).__name__.endswith("RMSNorm")]
    code: Any = sys.modules[type(model).__module__]
    attention, original = model.config._attn_implementation, code.apply_rotary_pos_emb
    try:
        for name, norm in norms:
            model.set_submodule(name, Norm(norm))
        code.apply_rotary_pos_emb = rotary
        model.config._attn_implementation = ATTENTION
        yield
    finally:
        for name, norm in norms:
            model.set_submodule(name, norm)
        code.apply_rotary_pos_emb = original
        model.config._attn_implementation = attention
