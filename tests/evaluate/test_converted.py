"""What coremltools' converter makes of a language model's usual pieces, against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packages import save, silently
from torch import nn

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package

HIDDEN = torch.rand(1, 4, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2
IDS = torch.tensor([[1, 2, 7]], dtype=torch.int32)
WEIGHT = torch.rand(9, 32, generator=torch.Generator().manual_seed(1))
KERNEL = torch.rand(8, 32, 3, generator=torch.Generator().manual_seed(2)) / 10


def heads(x, count=2):
    return x.view(1, 4, count, -1).transpose(1, 2)


def causal(x):
    scores = x @ x.transpose(1, 2)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ x


PIECES = {
    "embedding": (lambda ids: F.embedding(ids, WEIGHT), IDS),
    "positions": (lambda ids: (torch.arange(5)[None, :] <= ids[:, :, None]).float(), IDS),
    "one hot": (lambda ids: F.one_hot(ids.long(), 9).float(), IDS),
    "integers": (lambda ids: (ids // 2) * 2 + ids % 2, IDS),
    "rms norm": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), HIDDEN),
    "layer norm": (lambda x: F.layer_norm(x, (32,), WEIGHT[0], WEIGHT[1]), HIDDEN),
    "group norm": (lambda x: F.group_norm(x, 2), HIDDEN),
    "largest": (lambda x: x / x.abs().amax(-1, keepdim=True), HIDDEN),
    "rotary": (lambda x: x * x.cos() + torch.cat((-x[..., 16:], x[..., :16]), -1) * x.sin(), HIDDEN),
    "repeated heads": (lambda x: heads(x)[:, :, None].expand(1, 2, 7, 4, 16).reshape(1, 14, 4, 16), HIDDEN),
    "interleaved heads": (lambda x: heads(x).repeat_interleave(7, 1), HIDDEN),
    "masked attention": (causal, HIDDEN),
    "fused attention": (lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3, is_causal=True), HIDDEN),
    "scores by einsum": (lambda x: torch.einsum("bhid,bhjd->bhij", heads(x), heads(x)), HIDDEN),
    "gated": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], HIDDEN),
    "gelu": (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), HIDDEN),
    "linear": (lambda x: F.linear(x, WEIGHT), HIDDEN),
    "convolution": (lambda x: F.conv1d(x.transpose(1, 2), KERNEL, padding=1), HIDDEN),
    "last position": (lambda x: x[:, -1:], HIDDEN),
    "strided": (lambda x: x[:, :, 1::2], HIDDEN),
    "updated": (lambda x: torch.slice_scatter(torch.zeros(1, 4, 32), x[:, :2], 1, 1, 3), HIDDEN),
    "chosen": (lambda x: x.index_select(2, torch.tensor([3, 1, 0])), HIDDEN),
    "triangle": (lambda x: torch.tril(x @ x.transpose(1, 2)), HIDDEN),
    "where": (lambda x: torch.where(x > 0, x, x * 0.1), HIDDEN),
    "clamped": (lambda x: x.clamp(-1, 1) + x.clamp(min=0) + x.clamp(max=0.5), HIDDEN),
    "log of softmax": (lambda x: x.log_softmax(-1), HIDDEN),
    "top values": (lambda x: x.topk(5, -1)[0], HIDDEN),
    "most likely": (lambda x: x.argmax(-1).float(), HIDDEN),
    "sums so far": (lambda x: x.cumsum(1), HIDDEN),
    "padded": (lambda x: F.pad(x, (1, 2)), HIDDEN),
}


class Piece(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16"])
@pytest.mark.parametrize("name", PIECES)
def test_a_piece(name, arithmetic, tmp_path):
    import coremltools as ct

    function, x = PIECES[name]
    reference = function(x).numpy()
    traced = silently(lambda: torch.jit.trace(Piece(function).eval(), x))
    model = silently(
        lambda: ct.convert(
            traced,
            inputs=[ct.TensorType(name="x", shape=tuple(x.shape), dtype=x.numpy().dtype)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32 if arithmetic == "fp32" else ct.precision.FLOAT16,
            skip_model_load=True,
        )
    )
    evaluator = Evaluator(open_package(save(model, tmp_path)), arithmetic)
    (found,) = evaluator.run("main", {"x": x.numpy()}, evaluator.make_state()).values()
    assert found.shape == reference.shape
    close = {"rtol": 1e-5, "atol": 1e-5} if arithmetic == "fp32" else {"rtol": 5e-3, "atol": 1e-2}
    np.testing.assert_allclose(found, reference, **close)
