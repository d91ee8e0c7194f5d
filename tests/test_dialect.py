"""Each operator of the dialect against its formula, written out."""

import math

import pytest
import torch

from mobile_export import dialect

assert dialect.rotary is not None  # importing it registered the operators
OPS = torch.ops.mobile


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def start_at(position):
    return torch.tensor([position])


def test_rms_norm():
    x, weight = torch.randn(1, 3, 8) * 5, torch.randn(8)
    expected = torch.empty_like(x)
    for row in range(3):
        mean = sum(float(value) ** 2 for value in x[0, row]) / 8
        expected[0, row] = x[0, row] / math.sqrt(mean + 0.5) * weight
    assert torch.allclose(OPS.rms_norm(x, weight, 0.5), expected, atol=1e-6)
    assert torch.equal(OPS.rms_norm(torch.zeros(1, 1, 8), weight, 1e-6), torch.zeros(1, 1, 8))


def test_rotary_turns_each_pair_by_its_angle():
    x, angle = torch.randn(1, 2, 5, 8), torch.rand(1, 5, 4) * 6
    both = torch.cat((angle, angle), -1)
    turned = OPS.rotary(x, both.cos(), both.sin())
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert torch.allclose(turned, torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-6)


@pytest.mark.parametrize(("at", "length"), [(0, 1), (0, 6), (2, 3), (5, 1)])
def test_update_cache_writes_there_and_nowhere_else(at, length):
    cache, new = torch.randn(1, 2, 6, 4), torch.randn(1, 2, length, 4)
    before = cache.clone()
    updated = OPS.update_cache(cache, new, start_at(at))
    for position in range(6):
        source = new[:, :, position - at] if at <= position < at + length else before[:, :, position]
        assert torch.equal(updated[:, :, position], source)
    assert torch.equal(cache, before), "pure: the old cache stays"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("at", "length"), [(0, 1), (0, 5), (3, 1), (2, 4), (0, 8)])
def test_attention_is_causal_and_grouped(heads, kv_heads, at, length):
    q = torch.randn(1, heads, length, 4)
    k, v = torch.randn(1, kv_heads, 8, 4), torch.randn(1, kv_heads, 8, 4)
    k[:, :, at + length :] = torch.nan  # what lies past the text is never read
    v[:, :, at + length :] = torch.nan
    given = OPS.attention(q, k, v, start_at(at), 0.3)
    assert given.shape == q.shape
    for head in range(heads):
        group = head // (heads // kv_heads)
        for row in range(length):
            seen = at + row + 1
            weights = torch.softmax(k[0, group, :seen] @ q[0, head, row] * 0.3, 0)
            assert torch.allclose(given[0, head, row], weights @ v[0, group, :seen], atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_int8(biased):
    x, scales = torch.randn(1, 3, 6), torch.rand(4) + 0.1
    codes = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    bias = torch.randn(4) if biased else None
    given = OPS.linear_int8(x, codes, scales, bias)
    for row in range(3):
        for out in range(4):
            total = sum(float(x[0, row, i]) * int(codes[out, i]) * float(scales[out]) for i in range(6))
            assert math.isclose(given[0, row, out], total + (float(bias[out]) if biased else 0), abs_tol=1e-3)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_int4(biased):
    x, scales = torch.randn(1, 3, 6), torch.rand(4, 2) - 0.5
    codes = torch.randint(-8, 8, (4, 6), dtype=torch.int8)
    bias = torch.randn(4) if biased else None
    given = OPS.linear_int4(x, codes, scales, bias)
    for row in range(3):
        for out in range(4):
            terms = (float(x[0, row, i]) * int(codes[out, i]) * float(scales[out, i // 3]) for i in range(6))
            expected = sum(terms) + (float(bias[out]) if biased else 0)
            assert math.isclose(given[0, row, out], expected, abs_tol=1e-3)


def test_embedding_int8():
    codes = torch.randint(-127, 128, (9, 6), dtype=torch.int8)
    scales = torch.rand(9) + 0.1
    ids = torch.tensor([[8, 0, 3, 3]])
    given = OPS.embedding_int8(ids, codes, scales)
    for place, row in enumerate([8, 0, 3, 3]):
        assert torch.equal(given[0, place], codes[row].float() * scales[row])


def cases():
    cache, codes = torch.randn(1, 2, 6, 4), torch.ones(7, 4, dtype=torch.int8)
    x = torch.randn(1, 3, 4)
    return {
        "rms_norm": (x, torch.randn(4), 1e-6),
        "rotary": (torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)),
        "update_cache": (cache, torch.randn(1, 2, 3, 4), start_at(1)),
        "attention": (torch.randn(1, 4, 3, 4), cache, cache, start_at(1), 0.5),
        "linear_int8": (x, codes, torch.rand(7), torch.rand(7)),
        "linear_int4": (x, codes, torch.rand(7, 2), torch.rand(7)),
        "embedding_int8": (torch.tensor([[1, 2, 3]]), codes, torch.rand(7)),
    }


@pytest.mark.parametrize("name", sorted(cases()))
def test_an_operators_fake_and_schema_tell_the_truth(name):
    op = getattr(OPS, name).default
    args = cases()[name]
    # Shapes, dtypes and strides of the fake against the real result; no input mutated or returned.
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])
    assert fake.shape == op(*args).shape
