"""Compressed weights against numpy, the format's own examples, and coremltools' decompression."""

import numpy as np
import pytest
import torch
from cases import real
from packages import save, silently
from torch import nn

from mobile_export.evaluate.mil import Evaluator
from mobile_export.mlpackage import open_package

RANDOM = np.random.default_rng(1)


def typed(array, name):
    """An array of one of coremltools' own types, e.g. `uint4`."""
    from coremltools.converters.mil.mil import types

    return np.asarray(array).astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def spread(values, shape):
    """One value a block, repeated to cover `shape`."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


@pytest.fixture
def weight(evaluate):
    """What a weight is, read off an identity matrix; `make(mb)` builds it with shape [out, 6 or 12]."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    def run(make, *, opset=ct.target.iOS18, arithmetic="fp32"):
        def body(x):
            dense = make(mb)
            return mb.add(x=x, y=dense if not isinstance(dense, (tuple, list)) else dense[-1])

        return evaluate(body, [np.zeros(1, np.float32)], opset=opset, arithmetic=arithmetic)[0]

    return run


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("int8", -128, 128), ("uint8", 0, 256), ("int4", -8, 8), ("uint4", 0, 16)]
)
@pytest.mark.parametrize("blocks", [(4, 1), (1, 6), (2, 3)], ids=str)
@pytest.mark.parametrize("offset", [None, "same", "fp32"])
def test_blockwise_shift_scale(weight, kind, low, high, blocks, offset):
    data = RANDOM.integers(low, high, (4, 6))
    scale = real(*blocks)
    shift = {"same": RANDOM.integers(low, high, blocks), "fp32": real(*blocks)}.get(offset)
    stored = {"same": kind, "fp32": "fp32"}
    given = {} if shift is None else {"offset": typed(shift, stored[offset])}
    found = weight(
        lambda mb: mb.constexpr_blockwise_shift_scale(data=typed(data, kind), scale=scale, **given)
    )
    shifted = data if shift is None else data - spread(shift, data.shape)
    np.testing.assert_allclose(found, shifted * spread(scale, data.shape), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_palettes(weight, bits, groups):
    indices = RANDOM.integers(0, 2**bits, (4, 6))
    table = real(*groups, 2**bits, 1)
    found = weight(lambda mb: mb.constexpr_lut_to_dense(indices=typed(indices, f"uint{bits}"), lut=table))
    expected = [
        [table[row * groups[0] // 4, column * groups[1] // 6, indices[row, column], 0] for column in range(6)]
        for row in range(4)
    ]
    np.testing.assert_array_equal(found, np.float32(expected))


def test_palettes_as_the_format_says(weight):
    indices = [[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]]
    table = np.float32([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)
    found = weight(lambda mb: mb.constexpr_lut_to_dense(indices=typed(indices, "uint2"), lut=table))
    np.testing.assert_array_equal(found, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])


@pytest.mark.parametrize("axis", [1, 2, -2])
def test_palettes_of_vectors(weight, axis):
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]])
    a, b = [1, 2, 3], [4, 5, 6]
    table = np.float32([a, b]).reshape(1, 1, 1, 2, 3)
    found = weight(
        lambda mb: mb.constexpr_lut_to_dense(
            indices=typed(indices, "uint1"), lut=table, vector_axis=np.int32(axis)
        )
    )
    along_the_last = [[[*a, *a], [*b, *a]], [[*b, *b], [*a, *a]]]
    along_the_middle = [
        np.transpose([[*a, *b], [*a, *a]]),
        np.transpose([[*b, *a], [*b, *a]]),
    ]
    np.testing.assert_array_equal(found, along_the_last if axis == 2 else along_the_middle)


def test_palettes_of_codes(weight):
    """A palette of int8 codes, scaled block by block: two constexpr ops in a row."""
    indices = RANDOM.integers(0, 16, (4, 6))
    table = RANDOM.integers(-128, 128, 16)
    scale = real(4, 1)

    def make(mb):
        codes = mb.constexpr_lut_to_dense(
            indices=typed(indices, "uint4"), lut=table.astype(np.int8).reshape(1, 1, 16, 1)
        )
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)

    np.testing.assert_allclose(weight(make), table[indices] * scale, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palettes_of_ios_16(weight, bits):
    import coremltools as ct

    indices = RANDOM.integers(0, 2**bits, (5, 7)).astype(np.uint8)
    single = np.unpackbits(indices.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    packed = np.packbits(single.ravel(), bitorder="little")
    table = real(2**bits)
    found = weight(
        lambda mb: mb.constexpr_lut_to_dense(indices=packed, lut=table, shape=np.uint32(indices.shape)),
        opset=ct.target.iOS16,
    )
    np.testing.assert_array_equal(found, table[indices])


@pytest.mark.parametrize("axis", [0, 1])
def test_affine(weight, axis):
    import coremltools as ct

    data = RANDOM.integers(0, 256, (4, 6)).astype(np.uint8)
    scale, zero = real(data.shape[axis]), np.uint8(128)
    found = weight(
        lambda mb: mb.constexpr_affine_dequantize(
            quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(axis)
        ),
        opset=ct.target.iOS16,
    )
    shape = (-1, 1) if axis == 0 else (1, -1)
    np.testing.assert_allclose(found, (data - 128.0) * scale.reshape(shape), rtol=1e-6)


MASK = RANDOM.random((4, 6)) < 0.4
COUNT = int(MASK.sum())


def dense(values):
    result = np.zeros(MASK.shape, np.float32)
    result[MASK] = values
    return result


def test_sparse(weight):
    values = real(COUNT)
    found = weight(lambda mb: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=typed(MASK, "uint1")))
    np.testing.assert_array_equal(found, dense(values))


def test_sparse_of_ios_16(weight):
    import coremltools as ct

    values = real(COUNT)
    mask = np.packbits(MASK.ravel(), bitorder="little")
    found = weight(
        lambda mb: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, shape=np.uint32(MASK.shape)),
        opset=ct.target.iOS16,
    )
    np.testing.assert_array_equal(found, dense(values))


def test_sparse_palettes(weight):
    indices = RANDOM.integers(0, 4, COUNT)
    table = real(1, 1, 4, 1)

    def make(mb):
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=typed(MASK, "uint1"), indices_nonzero_data=typed(indices, "uint2"), lut=table
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)

    np.testing.assert_array_equal(weight(make), dense(table.ravel()[indices]))


def test_sparse_codes(weight):
    codes = RANDOM.integers(-128, 128, COUNT)
    scale = real(4, 1)

    def make(mb):
        mask, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=typed(MASK, "uint1"), nonzero_data=codes.astype(np.int8), scale=scale
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)

    np.testing.assert_allclose(weight(make), dense(codes) * scale, rtol=1e-6)


def test_a_cast(weight):
    import coremltools as ct

    values = real(4, 6).astype(np.float16)
    found = weight(
        lambda mb: mb.constexpr_cast(source_val=values, output_dtype="fp32"), opset=ct.target.iOS16
    )
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_fp16_weights_are_rounded_in_fp16_only(weight):
    data, scale = RANDOM.integers(-128, 128, (4, 6)).astype(np.int8), real(4, 1).astype(np.float16)

    def make(mb):
        return mb.cast(x=mb.constexpr_blockwise_shift_scale(data=data, scale=scale), dtype="fp32")

    exact = data * scale.astype(np.float32)
    assert (exact != exact.astype(np.float16)).any()
    np.testing.assert_array_equal(weight(make), exact)
    np.testing.assert_array_equal(weight(make, arithmetic="fp16"), exact.astype(np.float16))


@pytest.fixture(scope="module")
def model():
    """Two linears, one weight of 64 x 64."""
    import coremltools as ct

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).eval()
    traced = torch.jit.trace(module, torch.zeros(1, 64))
    return silently(
        lambda: ct.convert(
            traced,
            inputs=[ct.TensorType(name="x", shape=(1, 64))],
            outputs=[ct.TensorType(name="y")],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    )


def quantized(dtype, granularity):
    import coremltools.optimize.coreml as cto

    config = cto.OpLinearQuantizerConfig(
        dtype=dtype, granularity=granularity, weight_threshold=0, block_size=16
    )
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def palettized(bits):
    import coremltools.optimize.coreml as cto

    config = cto.OpPalettizerConfig(
        mode="uniform", nbits=bits, granularity="per_grouped_channel", group_size=16, weight_threshold=0
    )
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(config))


def pruned():
    import coremltools.optimize.coreml as cto

    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return lambda model: cto.prune_weights(model, cto.OptimizationConfig(config))


COMPRESSIONS = {
    "int8 a channel": (lambda: quantized("int8", "per_channel"), "constexpr_blockwise_shift_scale"),
    "uint8 a channel": (lambda: quantized("uint8", "per_channel"), "constexpr_blockwise_shift_scale"),
    "int4 a block": (lambda: quantized("int4", "per_block"), "constexpr_blockwise_shift_scale"),
    "4-bit palettes": (lambda: palettized(4), "constexpr_lut_to_dense"),
    "6-bit palettes": (lambda: palettized(6), "constexpr_lut_to_dense"),
    "sparse": (pruned, "constexpr_sparse_to_dense"),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_what_coremltools_compresses(model, name, tmp_path):
    """The compressed package computes what coremltools' own decompression of it computes."""
    import coremltools.optimize.coreml as cto

    make, op = COMPRESSIONS[name]
    compressed = silently(lambda: make()(model))
    plain = silently(lambda: cto.decompress_weights(compressed))
    x = {"x": real(1, 64)}
    results = []
    for index, one in enumerate((compressed, plain)):
        package = open_package(save(one, tmp_path / str(index)))
        types = {operation.type for operation in package.operations("main")}
        assert (op in types) == (one is compressed)
        evaluator = Evaluator(package)
        results.append(evaluator.run("main", x, evaluator.make_state())["y"])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
