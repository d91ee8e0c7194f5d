"""The evaluator against torch: states, functions, arithmetic, errors."""

import numpy as np
import pytest
import torch
from packages import save, silently
from torch import nn

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package

CONTEXT, CHUNK = 32, 4


class Attention(nn.Module):
    """One layer with its KV cache, `CHUNK` positions a call."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("k_cache", torch.zeros(1, 2, CONTEXT, 16))
        self.register_buffer("v_cache", torch.zeros(1, 2, CONTEXT, 16))

    def forward(self, ids, position, mask):
        parts = self.qkv(self.embed(ids)).view(1, CHUNK, 6, 16).transpose(1, 2).chunk(3, 1)
        q, k, v = parts
        start = position[0]
        self.k_cache[:, :, start : start + CHUNK] = k
        self.v_cache[:, :, start : start + CHUNK] = v
        seen = nn.functional.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        return nn.functional.silu(seen).transpose(1, 2).reshape(1, CHUNK, 32)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """The module and its package."""
    import coremltools as ct

    torch.manual_seed(0)
    module = Attention().eval()
    sample = (torch.zeros(1, CHUNK, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), mask_at(0))
    kinds = zip(("ids", "position", "mask"), sample, (np.int32, np.int32, np.float16), strict=True)
    cache = ct.TensorType(shape=(1, 2, CONTEXT, 16), dtype=np.float16)
    with torch.no_grad():
        traced = torch.jit.trace(module, sample, check_trace=False)
    model = silently(
        lambda: ct.convert(
            traced,
            inputs=[
                ct.TensorType(name=name, shape=tuple(one.shape), dtype=kind) for name, one, kind in kinds
            ],
            outputs=[ct.TensorType(name="out", dtype=np.float16)],
            states=[ct.StateType(wrapped_type=cache, name=f"{name}_cache") for name in "kv"],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    )
    return module, save(model, tmp_path_factory.mktemp("attention"))


def mask_at(start):
    return torch.where(torch.arange(CONTEXT) <= torch.arange(CHUNK)[:, None] + start, 0.0, -1e4)[None, None]


def chunks(module, count=3):
    """(inputs, what the module says) of `count` calls that continue one another."""
    module.k_cache.zero_()
    module.v_cache.zero_()
    random = torch.Generator().manual_seed(1)
    for start in range(0, count * CHUNK, CHUNK):
        ids = torch.randint(50, (1, CHUNK), generator=random)
        with torch.no_grad():
            expected = module(ids, torch.tensor([start]), mask_at(start))
        inputs = {"ids": ids.numpy(), "position": np.array([start]), "mask": mask_at(start).numpy()}
        yield inputs, expected.numpy()


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16"])
def test_a_cache_is_carried_from_call_to_call(attention, arithmetic):
    module, path = attention
    evaluator = Evaluator(open_package(path), arithmetic)
    state = evaluator.make_state()
    for inputs, expected in chunks(module):
        # 2e-3: weights, inputs and outputs are fp16 in the package.
        np.testing.assert_allclose(evaluator.run("main", inputs, state)["out"], expected, atol=2e-3)
