"""The evaluator against torch: states, functions, arithmetic, errors."""

import gc

import numpy as np
import pytest
import torch
from packages import save, silently
from torch import nn

from mobile_export.errors import ExportError
from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import TensorType, open_package

CONTEXT, CHUNK = 32, 4
CACHE = (1, 2, CONTEXT, 16)


class Attention(nn.Module):
    """One layer with its KV cache, `length` positions a call; the head is the embedding."""

    def __init__(self, length):
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(50, 32)
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("k_cache", torch.zeros(CACHE))
        self.register_buffer("v_cache", torch.zeros(CACHE))

    def forward(self, ids, position, mask):
        parts = self.qkv(self.embed(ids)).view(1, self.length, 6, 16).transpose(1, 2)
        q, k, v = parts.chunk(3, 1)
        start = position[0]
        self.k_cache[:, :, start : start + self.length] = k
        self.v_cache[:, :, start : start + self.length] = v
        seen = nn.functional.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        seen = nn.functional.silu(seen).transpose(1, 2).reshape(1, self.length, 32)
        return nn.functional.linear(seen, self.embed.weight)

    def reset(self):
        self.k_cache.zero_()
        self.v_cache.zero_()


def attention(length):
    torch.manual_seed(0)
    return Attention(length).eval()


def converted(length):
    import coremltools as ct

    ids, position = torch.zeros(1, length, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    sample = {"ids": ids, "position": position, "mask": mask_at(0, length)}
    kinds = {"ids": np.int32, "position": np.int32, "mask": np.float16}
    with torch.no_grad():
        traced = torch.jit.trace(attention(length), tuple(sample.values()), check_trace=False)
    cache = ct.TensorType(shape=CACHE, dtype=np.float16)
    return silently(
        lambda: ct.convert(
            traced,
            inputs=[
                ct.TensorType(name=name, shape=tuple(one.shape), dtype=kinds[name])
                for name, one in sample.items()
            ],
            outputs=[ct.TensorType(name="out", dtype=np.float16)],
            states=[ct.StateType(wrapped_type=cache, name=f"{name}_cache") for name in "kv"],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    )


def mask_at(start, length):
    seen = torch.arange(CONTEXT) <= torch.arange(length)[:, None] + start
    return torch.where(seen, 0.0, -1e4)[None, None]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A package of one function for `CHUNK` positions."""
    return save(converted(CHUNK), tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def double(single, tmp_path_factory):
    """`prefill` for `CHUNK` positions and `decode` for one, merged as coremltools merges."""
    import coremltools as ct

    folder = tmp_path_factory.mktemp("double")
    descriptor = ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(single), "main", "prefill")
    descriptor.add_function(str(save(converted(1), folder / "decode")), "main", "decode")
    descriptor.default_function_name = "decode"
    silently(lambda: ct.utils.save_multifunction(descriptor, str(folder / "model.mlpackage")))
    return folder / "model.mlpackage"


IDS = np.random.default_rng(1).integers(0, 50, (1, 3 * CHUNK))


def given(start, length):
    ids = IDS[:, start : start + length]
    return {"ids": ids, "position": np.array([start]), "mask": mask_at(start, length).numpy()}


def expected(starts, length, module=None):
    """What the module says, call after call from an empty cache."""
    module = module or attention(length)
    module.reset()
    with torch.no_grad():
        calls = [map(torch.from_numpy, given(start, length).values()) for start in starts]
        return [module(*inputs).numpy() for inputs in calls]


CHUNKS = range(0, 3 * CHUNK, CHUNK)
CLOSE = {"atol": 4e-3}
"""Weights, inputs and outputs are fp16 in the packages."""


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16"])
def test_a_cache_is_carried_from_call_to_call(single, arithmetic):
    evaluator = Evaluator(open_package(single), arithmetic)
    state = evaluator.make_state()
    for start, reference in zip(CHUNKS, expected(CHUNKS, CHUNK), strict=True):
        np.testing.assert_allclose(
            evaluator.run("main", given(start, CHUNK), state)["out"], reference, **CLOSE
        )
    with pytest.raises(AssertionError):
        fresh = evaluator.run("main", given(start, CHUNK), evaluator.make_state())
        np.testing.assert_allclose(fresh["out"], reference, **CLOSE)


def test_what_a_function_declares(single):
    evaluator = Evaluator(open_package(single))
    assert evaluator.functions == ("main",)
    assert evaluator.inputs("main") == {
        "ids": TensorType("int32", (1, CHUNK)),
        "position": TensorType("int32", (1,)),
        "mask": TensorType("fp16", (1, 1, CHUNK, CONTEXT)),
    }
    assert evaluator.states("main") == {
        name: TensorType("fp16", CACHE, True) for name in ("k_cache", "v_cache")
    }
    assert evaluator.outputs("main") == {"out": TensorType("fp16", (1, CHUNK, 50))}


def test_functions_share_state(double):
    """A chunk, then token by token, as torch says it in one call."""
    evaluator = Evaluator(open_package(double), "fp16")
    assert evaluator.functions == ("decode", "prefill")
    state = evaluator.make_state()
    rows = [evaluator.run("prefill", given(0, CHUNK), state)["out"]]
    rows += [evaluator.run("decode", given(start, 1), state)["out"] for start in range(CHUNK, 3 * CHUNK)]
    whole = np.concatenate(expected(CHUNKS, CHUNK), axis=1)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), whole, **CLOSE)


def test_functions_share_weights(double):
    """One tensor for a tied weight, in every op of every function; it goes with the last evaluator."""
    package = open_package(double)
    evaluator = Evaluator(package)
    weights = {}

    def tap(site, arguments, value):
        for one in arguments.values():
            if isinstance(one, torch.Tensor) and one.shape == (50, 32):
                weights[site.function, site.op] = one.data_ptr()

    state = evaluator.make_state()
    evaluator.run("prefill", given(0, CHUNK), state, tap)
    evaluator.run("decode", given(CHUNK, 1), state, tap)
    assert len(weights) == 4
    assert len(set(weights.values())) == 1
    del evaluator
    gc.collect()
    assert not package.constants["evaluate"]


@pytest.mark.parametrize("arithmetic", ["fp32", "fp16"])
def test_state_is_in_the_arithmetic(single, arithmetic):
    evaluator = Evaluator(open_package(single), arithmetic)
    state = evaluator.make_state("main")
    assert sorted(state) == ["k_cache", "v_cache"]
    evaluator.run("main", given(0, CHUNK), state)
    written = state["k_cache"][:, :, :CHUNK].numpy()
    assert (written == written.astype(np.float16)).all() == (arithmetic == "fp16")


def test_a_state_declared_twice(double):
    package = open_package(double)
    for one in package.functions["decode"].inputs:
        if one.name == "k_cache":
            one.type.stateType.wrappedType.tensorType.dimensions[2].constant.size = CONTEXT // 2
    with pytest.raises(ExportError, match="two functions declare state 'k_cache' differently"):
        Evaluator(package).make_state()


class Flexible(nn.Module):
    def forward(self, x):
        wide = x.flatten(1)
        return torch.cat((wide.cumsum(1), wide[:, -2:]), 1).softmax(-1)


@pytest.fixture
def flexible(tmp_path):
    """An evaluator of the module above, its second dimension as given."""
    import coremltools as ct

    def make(**options):
        traced = torch.jit.trace(Flexible(), torch.zeros(2, 3, 4))
        model = silently(
            lambda: ct.convert(
                traced,
                inputs=[ct.TensorType(name="x", **options)],
                outputs=[ct.TensorType(name="y")],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,
                skip_model_load=True,
            )
        )
        return Evaluator(open_package(save(model, tmp_path)))

    return make


def flexible_run(evaluator, length):
    x = torch.rand(2, length, 4)
    (found,) = evaluator.run("main", {"x": x.numpy()}, evaluator.make_state()).values()
    np.testing.assert_allclose(found, Flexible()(x).numpy(), rtol=1e-5)


def test_a_range_of_shapes(flexible):
    import coremltools as ct

    evaluator = flexible(shape=(2, ct.RangeDim(2, 9, default=3), 4))
    assert evaluator.inputs("main")["x"].shape == (2, None, 4)
    for length in (2, 5, 9):
        flexible_run(evaluator, length)
    for length in (1, 10):
        with pytest.raises(ValueError, match=r"allowed is \[2, 2..9, 4\]"):
            flexible_run(evaluator, length)


def test_a_list_of_shapes(flexible):
    import coremltools as ct

    evaluator = flexible(shape=ct.EnumeratedShapes([(2, 3, 4), (2, 8, 4)], default=(2, 3, 4)))
    for length in (3, 8):
        flexible_run(evaluator, length)
    with pytest.raises(ValueError, match=r"allowed is \[2, (3, 4\] or \[2, 8|8, 4\] or \[2, 3), 4\]"):
        flexible_run(evaluator, 4)


def test_every_output_is_rounded_in_fp16(evaluate):
    """1 + 2^-11 is no fp16 number, and 65520 rounds to infinity; fp32-declared values stay."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    def body(x):
        far = mb.mul(x=mb.cast(x=x, dtype="fp32"), y=np.float32(1 + 2**-11))
        return mb.sub(x=mb.mul(x=x, y=np.float16(1 + 2**-10)), y=x), mb.mul(x=x, y=np.float16(65504)), far

    x = np.float16([0.5, 1.0, 1.5])
    options = {"precision": ct.precision.FLOAT16}
    low, high, wide = evaluate(body, [x], arithmetic="fp16", **options)
    step, big, factor = np.float16(1 + 2**-10), np.float16(65504), np.float32(1 + 2**-11)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(low, x * step - x)
        np.testing.assert_array_equal(high, x * big)
    np.testing.assert_array_equal(wide, x.astype(np.float32) * factor)

    x = x.astype(np.float32)
    low, high, wide = evaluate(body, [x.astype(np.float16)], **options)
    np.testing.assert_array_equal(low, x * np.float32(step) - x)
    np.testing.assert_array_equal(high, x * np.float32(65504))
    np.testing.assert_array_equal(wide, x * factor)


def test_a_default_epsilon_is_of_the_input_s_type(build):
    """1e-12 is 0 in fp16, and this is what coremltools stores: leaving it out means the same."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    zero = np.float16([0.0])
    package = open_package(build(lambda x: mb.rsqrt(x=x), [zero], precision=ct.precision.FLOAT16))
    (op,) = (op for op in package.operations("main") if op.type == "rsqrt")
    for present in (True, False):
        evaluator = Evaluator(package)
        (found,) = evaluator.run("main", {"in_0": zero}, evaluator.make_state()).values()
        assert np.isposinf(found), present
        op.inputs.pop("epsilon", None)


@pytest.fixture
def softmax(build):
    """A package of one op that a test may alter, and the op."""
    from coremltools.converters.mil import Builder as mb

    x = np.zeros((2, 3), np.float32)
    package = open_package(build(lambda x: mb.softmax(x=x, axis=-1, name="chosen"), [x]))
    (op,) = (op for op in package.operations("main") if op.type == "softmax")
    return package, op


def test_an_unknown_op_is_named(softmax):
    package, op = softmax
    op.type = "lstm"
    with pytest.raises(ExportError, match=r"op 'lstm' \('chosen'\) is not one that we evaluate"):
        Evaluator(package)


def test_an_unknown_parameter_is_named(softmax):
    package, op = softmax
    op.inputs["causal"].CopyFrom(op.inputs["axis"])
    with pytest.raises(ExportError, match=r"op 'softmax' \('chosen'\) has a parameter 'causal'"):
        Evaluator(package)


def test_a_missing_parameter_is_named(softmax):
    package, op = softmax
    op.inputs.pop("x")
    with pytest.raises(ExportError, match="lacks its parameter 'x'"):
        Evaluator(package)


def test_an_unknown_mode_is_named(build):
    from coremltools.converters.mil import Builder as mb

    package = open_package(build(lambda x: mb.gelu(x=x), [np.zeros(3, np.float32)]))
    for op in package.operations("main"):
        if op.type == "const" and op.attributes["val"].immediateValue.tensor.strings.values:
            op.attributes["val"].immediateValue.tensor.strings.values[0] = "FASTER"
    with pytest.raises(ExportError, match="has 'FASTER' as its 'mode', which we do not evaluate"):
        Evaluator(package)


def test_an_op_that_fails_is_named(build):
    from coremltools.converters.mil import Builder as mb

    table = np.ones((4, 2), np.float32)
    package = open_package(build(lambda i: mb.gather(x=table, indices=i, name="look_up"), [np.int32([1])]))
    evaluator = Evaluator(package)
    with pytest.raises(
        ExportError, match=r"op 'gather' \('look_up'\) cannot be computed: index out of range"
    ):
        evaluator.run("main", {"in_0": np.int32([4])}, evaluator.make_state())


def test_a_shape_other_than_declared_is_an_error(softmax):
    package, op = softmax
    op.outputs[0].type.tensorType.dimensions[1].constant.size = 4
    evaluator = Evaluator(package)
    with pytest.raises(ExportError, match=r"\('chosen'\) gives \[2, 3\] where \[2, 4\] is declared"):
        evaluator.run("main", {"in_0": np.zeros((2, 3))}, evaluator.make_state())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs are \[\], declared are \['in_0'\]"),
        ({"in_0": np.zeros((2, 4))}, r"input 'in_0' is \[2, 4\], declared is \[2, 3\]"),
        ({"in_0": np.zeros((2, 3), int)}, "input 'in_0' is int64, declared is fp32"),
    ],
)
def test_wrong_inputs(softmax, inputs, message):
    evaluator = Evaluator(softmax[0])
    with pytest.raises(ValueError, match=message):
        evaluator.run("main", inputs, evaluator.make_state())


def test_a_state_of_another_function(single, softmax):
    stateless = Evaluator(softmax[0]).make_state()
    with pytest.raises(ValueError, match=r"the state lacks \['k_cache', 'v_cache'\]"):
        Evaluator(open_package(single)).run("main", given(0, CHUNK), stateless)


def test_threads_are_given_back(softmax):
    before = torch.get_num_threads()
    evaluator = Evaluator(softmax[0], threads=before + 1)
    seen = []
    evaluator.run(
        "main",
        {"in_0": np.zeros((2, 3))},
        evaluator.make_state(),
        tap=lambda *_: seen.append(torch.get_num_threads()),
    )
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_constants_as_outputs(build):
    from coremltools.converters.mil import Builder as mb

    package = open_package(
        build(lambda x: (mb.identity(x=x), mb.const(val=np.float32([3, 4]))), [np.float32([1])])
    )
    evaluator = Evaluator(package)
    results = evaluator.run("main", {"in_0": np.float32([1])}, evaluator.make_state())
    np.testing.assert_array_equal(np.concatenate(list(results.values())), [1, 3, 4])


def test_a_parameter_of_another_size_is_named(softmax):
    package, op = softmax
    op.inputs["axis"].arguments.add().CopyFrom(op.inputs["axis"].arguments[0])
    with pytest.raises(ExportError, match=r"\('chosen'\) has a parameter 'axis' of a size that is not its"):
        Evaluator(package)


def test_a_value_that_nothing_computes_is_named(softmax):
    package, op = softmax
    op.inputs["x"].arguments[0].name = "lost"
    with pytest.raises(ExportError, match=r"\('chosen'\) needs 'lost', which nothing computes"):
        Evaluator(package)
