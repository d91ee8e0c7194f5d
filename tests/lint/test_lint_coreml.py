import msgspec
import numpy as np
import pytest
from test_bundle import make_manifest

from mobile_export import bundle
from mobile_export.errors import ExportError
from mobile_export.lint import _coreml_look, coreml, lint


def step(width=64, *, outputs=32, position=None, name="keyCache", symbolic=False):
    """A cache that is written and read, and a projection: one function of a package."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import get_new_symbol, types

    length = get_new_symbol() if symbolic else 1
    specs = [
        mb.TensorSpec(shape=(1, length, width), dtype=types.fp16),
        mb.StateTensorSpec(shape=(1, 128, width), dtype=types.fp16),
    ]
    if position:
        specs.insert(1, mb.TensorSpec(shape=(1,), dtype=types.int32))
    weight = np.random.default_rng(0).standard_normal((outputs, width)).astype(np.float16)

    def write(cache, new, begin, end):
        kept = mb.slice_update(
            x=mb.read_state(input=cache), update=new, begin=begin, end=end, stride=[1, 1, 1]
        )
        mb.coreml_update_state(state=cache, value=kept)

    def fixed(inputIds, keyCache):
        update = mb.reduce_sum(x=inputIds, axes=[1], keep_dims=True)
        write(keyCache, update, [0, 0, 0], [1, 1, width])
        return mb.linear(x=inputIds, weight=weight, name="logits")

    def moving(inputIds, position, keyCache):
        zero = np.array([0], np.int32)
        begin = mb.concat(values=[zero, position, zero], axis=0)
        end = mb.add(x=begin, y=np.array([1, 1, width], np.int32))
        write(keyCache, inputIds, begin, end)
        return mb.linear(x=inputIds, weight=weight, name="logits")

    return (moving if position else fixed), specs


def stateless(outputs=32, dtype="fp16"):
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    kind = types.fp32 if dtype == "fp32" else types.fp16
    weight = np.ones((outputs, 64), np.float32 if dtype == "fp32" else np.float16)

    def body(inputIds):
        return mb.linear(x=inputIds, weight=weight, name="logits")

    return body, [mb.TensorSpec(shape=(1, 1, 64), dtype=kind)]


def palettized(bits):
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    kind = types.np_uint4_dtype if bits == 4 else np.uint8
    indices = np.arange(32 * 64).reshape(32, 64) % 2**bits
    table = np.linspace(-1, 1, 2**bits).astype(np.float16).reshape(1, 1, 2**bits, 1)

    def body(inputIds, keyCache):
        mb.coreml_update_state(state=keyCache, value=mb.add(x=mb.read_state(input=keyCache), y=np.float16(1)))
        weight = mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=table)
        return mb.linear(x=inputIds, weight=weight, name="logits")

    shape = mb.StateTensorSpec(shape=(1, 128, 64), dtype=types.fp16)
    return body, [mb.TensorSpec(shape=(1, 1, 64), dtype=types.fp16), shape]


@pytest.fixture(scope="module")
def plain(coreml_bundle):
    """One function with a state, as most rules want it."""
    return coreml_bundle({"main": step()})


@pytest.fixture(scope="module")
def bare(coreml_bundle):
    """One function without states, narrow, fp16."""
    return coreml_bundle({"main": stateless()})


def found(made, rule):
    return [one.message for one in lint(made).findings if one.rule == rule]


def test_a_state_is_a_multiple_of_32_wide(coreml_bundle, plain):
    [message] = found(coreml_bundle({"main": step(48)}), "coreml-state-width")
    assert "1 of 1 states" in message and "keyCache [1, 128, 48]" in message
    assert not found(plain, "coreml-state-width")


def test_what_needs_ios_18_is_said(coreml_bundle, plain, bare):
    both = coreml_bundle({"prefill": step(), "decode": step()})
    [message] = found(both, "coreml-minimum-os")
    assert "iOS 18" in message and "1 states" in message and "2 functions" in message
    assert "slice_update" in found(plain, "coreml-minimum-os")[0]
    assert "functions" not in found(bare, "coreml-minimum-os")[0]


def test_a_version_below_what_is_used_is_an_error(coreml_bundle, plain):
    def older(spec):
        spec.specificationVersion = 8

    report = lint(coreml_bundle({"main": step()}, spec=older))
    [finding] = [one for one in report.findings if one.rule == "coreml-version"]
    assert finding.severity == "error" and "is 8" in finding.message and "1 states (9)" in finding.message
    assert report.fails() and report.findings[0] is finding
    assert not found(plain, "coreml-version")


def test_a_manifest_that_promises_an_older_ios_is_an_error(coreml_bundle):
    [message] = found(coreml_bundle({"main": step()}, minimum="iOS 17"), "coreml-version")
    assert "iOS 17" in message and "iOS 18" in message


def test_varying_inputs_beside_states(coreml_bundle, plain):
    import coremltools as ct

    flexible = coreml_bundle(
        {"main": step(symbolic=True)},
        inputs=[
            ct.TensorType(name="inputIds", shape=ct.Shape((1, ct.RangeDim(1, 64), 64)), dtype=np.float16)
        ],
    )
    [message] = found(flexible, "coreml-flexible-state")
    assert "inputIds" in message
    assert not found(plain, "coreml-flexible-state")


def test_a_wide_head(coreml_bundle, plain):
    [message] = found(coreml_bundle({"main": step(32, outputs=16_416)}), "coreml-wide-dimension")
    assert "logits" in message and "16416" in message
    assert not found(plain, "coreml-wide-dimension")


def attention(repeat):
    """Two query heads on one key head, repeated by `repeat` over 5 or 4 dimensions."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    def body(query, cache):
        if repeat == 5:
            keys = mb.tile(x=mb.expand_dims(x=cache, axes=[2]), reps=[1, 1, 2, 1, 1])
            keys = mb.reshape(x=keys, shape=[1, 2, 32, 64])
        else:
            keys = mb.concat(values=[cache, cache], axis=1)
        return mb.scaled_dot_product_attention(query=query, key=keys, value=keys, name="logits")

    shapes = (1, 2, 1, 64), (1, 1, 32, 64)
    return body, [mb.TensorSpec(shape=shape, dtype=types.fp16) for shape in shapes]


def test_attention_in_five_dimensions(coreml_bundle, plain):
    five, four = (coreml_bundle({"main": attention(repeat)}) for repeat in (5, 4))
    assert "[1, 1, 1, 32, 64]" in found(five, "coreml-five-dimensions")[0]
    assert not found(four, "coreml-five-dimensions")
    assert found(four, "coreml-fused-attention") == ["1 scaled_dot_product_attention in function main"]
    assert not found(plain, "coreml-fused-attention")


def test_palettes_of_4_bits_beside_a_state(coreml_bundle):
    made = {"coremltools": "9.0"}
    [message] = found(coreml_bundle({"main": palettized(4)}, tools=made), "coreml-palette-state")
    assert message.startswith("1 weights")
    assert not found(coreml_bundle({"main": palettized(8)}, tools=made), "coreml-palette-state")
    older = coreml_bundle({"main": palettized(4)}, tools={"coremltools": "8.3.0"})
    assert not found(older, "coreml-palette-state")
    itself = coreml_bundle({"main": palettized(4)}, tools={})  # the package says what made it
    assert "coremltools 9.0" in found(itself, "coreml-palette-state")[0]


def test_fp32_ops(coreml_bundle, plain):
    [message] = found(coreml_bundle({"main": stateless(dtype="fp32")}, dtype="fp32"), "coreml-fp32")
    assert "linear" in message
    assert not found(plain, "coreml-fp32")


def test_memory_is_weights_and_states_and_the_largest_step(plain):
    looked = _coreml_look.look(plain)
    weights, states, largest = _coreml_look.need(looked)
    assert weights == sum(f.bytes for n, f in plain.manifest.files.items() if n.endswith("weight.bin")) > 4096
    assert states == 128 * 64 * 2
    assert largest == 2 * states + 64 * 2  # a slice update: the old cache, the new one, one position
    assert found(plain, "coreml-memory")


def test_memory_past_an_applications_limit(plain):
    assert not found(plain, "coreml-memory-limit")
    sparse = _coreml_look.look(plain)
    heavy = _coreml_look.Looked(sparse.manifest, sparse.package, sparse.functions, weight_bytes=2_200_000_000)
    [message] = list(coreml._memory_limit(heavy))
    assert "2.2 GB" in message and "2.1 GB" in message and "without the entitlement" in message


def test_integer_inputs(coreml_bundle, plain, bare):
    [message] = found(coreml_bundle({"main": step(position=True)}), "coreml-integer")
    assert "position" in message
    assert not found(bare, "coreml-integer")


def test_a_cache_written_where_an_input_says(coreml_bundle, plain):
    [message] = found(coreml_bundle({"main": step(position=True)}), "coreml-dynamic-write")
    assert message.startswith("1 of 1 ")
    assert not found(plain, "coreml-dynamic-write")


def test_names_that_swift_transformers_does_not_know(coreml_bundle, plain):
    [message] = found(coreml_bundle({"main": step(position=True)}), "coreml-names")
    assert message == "function main has position"
    assert not found(plain, "coreml-names")


def test_a_bundle_without_a_package_is_an_error(tmp_path):
    with bundle.create(tmp_path / "odd") as draft:
        draft.path("model.bin", "program").write_bytes(b"program")
        draft.finish(msgspec.structs.replace(make_manifest(), target="coreml"))
    with pytest.raises(ExportError, match="0 Core ML packages"):
        lint(bundle.load(tmp_path / "odd"))
