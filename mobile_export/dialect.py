"""The operators of the target-neutral program, each with its eager definition (namespace `mobile`).

Importing this module registers them with torch. A target lowers each to its runtime's own form;
the `reference` target runs the definitions below. All are pure: nothing is written in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op


@custom_op("mobile::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dim. x fp32 [..., D], weight [D].

    Source: arXiv 1910.07467.
    """
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("mobile::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form. x fp32 [1, H, S, D]; cos, sin fp32 [1, S, D].

    Source: arXiv 2104.09864.
    """
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("mobile::update_cache", mutates_args=())
def update_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """`cache` fp32 [1, H, L, D] with `new` [1, H, S, D] at `[start, start + S)`; start int64 [1]."""
    position = int(start)
    updated = cache.clone()
    updated[:, :, position : position + new.shape[2]] = new
    return updated


@update_cache.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


@custom_op("mobile::attention", mutates_args=())
def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention of q over the cache's `[0, start + S)`.

    q fp32 [1, H, S, D]; caches [1, H_kv, L, D], H a multiple of H_kv; start int64 [1] -> [1, H, S, D].
    """
    begin, length = int(start), q.shape[2]
    end = begin + length
    mask = torch.arange(end) <= torch.arange(begin, end)[:, None]
    k, v = k_cache[:, :, :end], v_cache[:, :, :end]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("mobile::linear_int8", mutates_args=())
def linear_int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ (codes * scales)^T + bias`. x fp32 [..., K]; codes int8 [N, K]; scales fp32 [N]; bias fp32 [N]."""
    return F.linear(x, codes.float() * scales[:, None], bias)


@linear_int8.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@custom_op("mobile::linear_int4", mutates_args=())
def linear_int4(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ (codes * scales)^T + bias`, a scale for each group of K / G columns of a row.

    x fp32 [..., K]; codes int8 [N, K] in [-8, 7], one a byte; scales fp32 [N, G]; bias fp32 [N].
    """
    groups = codes.float().unflatten(1, (scales.shape[1], -1))
    return F.linear(x, (groups * scales[..., None]).flatten(1), bias)


@linear_int4.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@custom_op("mobile::embedding_int8", mutates_args=())
def embedding_int8(ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Rows `ids` int64 [1, S] of `codes * scales` (int8 [V, D], fp32 [V]) -> fp32 [1, S, D]."""
    return codes[ids].float() * scales[ids][..., None]


@embedding_int8.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return scales.new_empty(*ids.shape, codes.shape[1])
