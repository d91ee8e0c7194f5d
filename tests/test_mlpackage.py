"""Reading a saved package: the same weights as coremltools' own reader, and an error for what is damaged."""

import json
import shutil

import numpy as np
import pytest

from mobile_export.errors import ExportError
from mobile_export.mlpackage import TensorType, constant, open_package, tensor_type

DATA = "Data/com.apple.CoreML"
WEIGHTS = f"{DATA}/weights/weight.bin"
RANDOM = np.random.default_rng(0)
CODES = {
    "int8": RANDOM.integers(-128, 128, (16, 32)),
    "uint8": RANDOM.integers(0, 256, (16, 32)),
    "int4": RANDOM.integers(-8, 8, (16, 32)),
    "uint4": RANDOM.integers(0, 16, (16, 32)),
}
INDICES = {f"uint{bits}": RANDOM.integers(0, 2**bits, (7, 31)) for bits in (1, 2, 3, 4, 6, 8)}
SCALE = RANDOM.random((16, 1)).astype(np.float16)
PLAIN = {"fp16": RANDOM.random((5, 7)).astype(np.float16), "fp32": RANDOM.random((5, 7)).astype(np.float32)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Weights of every type, in one function."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Program, types

    def typed(array, name):
        return array.astype(types.nptype_from_builtin(types.string_to_builtin(name)))

    @mb.program(input_specs=[mb.TensorSpec((1,), dtype=types.fp32)], opset_version=ct.target.iOS18)
    def program(x):
        outputs = []
        for kind, codes in CODES.items():
            one = mb.constexpr_blockwise_shift_scale(
                data=typed(codes, kind), scale=SCALE, name=f"codes_{kind}"
            )
            outputs.append(mb.cast(x=one, dtype="fp32"))
        for kind, indices in INDICES.items():
            table = RANDOM.random((1, 1, 2 ** int(kind[4:]), 1)).astype(np.float32)
            outputs.append(
                mb.constexpr_lut_to_dense(indices=typed(indices, kind), lut=table, name=f"table_{kind}")
            )
        for kind, plain in PLAIN.items():
            outputs.append(mb.cast(x=mb.const(val=plain, name=f"plain_{kind}"), dtype="fp32"))
        outputs = [mb.reduce_sum(x=one) for one in outputs]
        small = mb.const(val=np.int32([3, -4]), name="small")
        return (mb.add(x=x, y=mb.concat(values=outputs, axis=0)), mb.identity(x=small, name="numbers"))

    assert isinstance(program, Program)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.user_defined_metadata["source"] = "a test"
    model.author = "nobody"
    path = tmp_path_factory.mktemp("saved") / "model.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture
def copied(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model.mlpackage")


def in_storage(operations):
    """name -> Value message: of a constant, or of an argument as `op's output.parameter`."""
    values = {}
    for op in operations:
        for key, value in op.attributes.items():
            values[op.outputs[0].name if key == "val" else f"{op.outputs[0].name}.{key}"] = value
        for key, argument in op.inputs.items():
            if argument.arguments[0].WhichOneof("binding") == "value":
                values[f"{op.outputs[0].name}.{key}"] = argument.arguments[0].value
    return {name: value for name, value in values.items() if value.WhichOneof("value") == "blobFileValue"}


def stored(package):
    return in_storage(package.operations("main"))


def test_weights_are_what_coremltools_reads(saved):
    from coremltools.libmilstoragepython import _BlobStorageReader

    reader = _BlobStorageReader(str(saved / WEIGHTS))
    package = open_package(saved)
    seen = set()
    for value in stored(package).values():
        kind, blob = tensor_type(value.type), package.blob(value)
        seen.add(kind.dtype)
        assert blob.file == "weights/weight.bin"
        name = "float" if kind.dtype == "fp32" else kind.dtype
        theirs = np.array(getattr(reader, f"read_{name}_data")(blob.offset))
        if kind.dtype == "fp16":
            theirs = theirs.astype(np.uint16).view(np.float16)
        np.testing.assert_array_equal(package.value(value), theirs.reshape(kind.shape))
    assert seen == {*CODES, *INDICES, *PLAIN}


def test_weights_are_what_was_saved(saved):
    """Sub-byte types too, whose values cross bytes (3 and 6 bits) and do not fill the last (7 x 31)."""
    package = open_package(saved)
    values = stored(package)
    for kind, codes in CODES.items():
        found = package.value(values[f"codes_{kind}.data"])
        np.testing.assert_array_equal(found, codes)
        assert found.dtype == np.dtype("int8" if kind.startswith("int") else "uint8")
    for kind, indices in INDICES.items():
        np.testing.assert_array_equal(package.value(values[f"table_{kind}.indices"]), indices)
    for kind, plain in PLAIN.items():
        np.testing.assert_array_equal(package.value(values[f"plain_{kind}"]), plain)


def test_codes(saved):
    found = open_package(saved).codes()
    assert list(found) == [f"codes_{kind}" for kind in CODES]
    for kind, codes in CODES.items():
        one = found[f"codes_{kind}"]
        np.testing.assert_array_equal(one.data, codes)
        np.testing.assert_array_equal(one.scale, SCALE)
        assert one.offset is None
        assert one.blob.file == "weights/weight.bin"
    assert len({one.blob for one in found.values()}) == len(CODES)


def test_what_is_in_the_program_itself(saved):
    package = open_package(saved)
    constants = {
        op.outputs[0].name: op.attributes["val"] for op in package.operations("main") if op.type == "const"
    }
    small = constants["small"]
    np.testing.assert_array_equal(package.value(small), np.int32([3, -4]))
    assert package.blob(small) is None
    assert tensor_type(small.type) == TensorType("int32", (2,))
    (cast, *_) = (op for op in package.operations("main") if op.type == "cast")
    assert package.value(constant(cast, "dtype", constants)) == "fp32"
    assert constant(cast, "x", constants) is None
    assert constant(cast, "absent", constants) is None


def test_metadata(saved):
    metadata = open_package(saved).metadata
    assert metadata["author"] == "nobody"
    assert metadata["source"] == "a test"
    assert "license" not in metadata


def test_the_weights_stay_on_disk(saved):
    package = open_package(saved)
    found = package.value(stored(package)["plain_fp32"])
    assert not found.flags.writeable
    assert not found.flags.owndata


def refused(path, message):
    with pytest.raises(ExportError, match=message) as caught:
        open_package(path)
    assert "\n" not in str(caught.value)


def index_of(package):
    return json.loads((package / "Manifest.json").read_text())


def test_nothing_there(tmp_path):
    refused(tmp_path / "none.mlpackage", "is not a Core ML package; name a .mlpackage folder")
    refused(tmp_path, "has no Manifest.json; name a .mlpackage folder")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rootModelIdentifier": "a", "itemInfoEntries": {}}'])
def test_a_damaged_index(copied, text):
    (copied / "Manifest.json").write_text(text)
    refused(copied, "is damaged: its Manifest.json names no model")


def test_a_missing_model(copied):
    (copied / DATA / "model.mlmodel").unlink()
    refused(copied, "is damaged: 'com.apple.CoreML/model.mlmodel' is missing")


def test_a_damaged_model(copied):
    model = copied / DATA / "model.mlmodel"
    model.write_bytes(b"\xff" + model.read_bytes())
    refused(copied, "is damaged: its model cannot be read")


def test_no_program(copied):
    (copied / DATA / "model.mlmodel").write_bytes(b"")
    refused(copied, "holds no ML Program")


@pytest.mark.parametrize("place", ["../outside/model.mlmodel", "/etc/hostname", "../Manifest.json"])
def test_an_index_that_leaves(copied, place):
    index = index_of(copied)
    index["itemInfoEntries"][index["rootModelIdentifier"]]["path"] = place
    (copied / "Manifest.json").write_text(json.dumps(index))
    refused(copied, "leads out of its folder")


@pytest.mark.parametrize("linked", ["Data", DATA, f"{DATA}/model.mlmodel", f"{DATA}/weights", WEIGHTS])
def test_a_link_that_leaves(copied, saved, linked):
    place = copied / linked
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(saved / linked)
    refused(copied, "leads out of its folder")


@pytest.mark.parametrize(
    "name", ["../model.mlmodel", "../../../../outside.bin", "/etc/hostname", "weights/../../x"]
)
def test_weights_that_leave(copied, tmp_path, name):
    (tmp_path / "outside.bin").write_bytes((copied / WEIGHTS).read_bytes())
    alter(copied, lambda value: setattr(value.blobFileValue, "fileName", f"@model_path/{name}"))
    refused(copied, "leads out of its folder")


def alter(package, change):
    """Change every value in blob storage."""
    from coremltools.proto import Model_pb2

    model = package / DATA / "model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(model.read_bytes())
    for block in spec.mlProgram.functions["main"].block_specializations.values():
        for value in in_storage(block.operations).values():
            change(value)
    model.write_bytes(spec.SerializeToString())


def test_missing_weights(copied):
    (copied / WEIGHTS).unlink()
    refused(copied, "is damaged: 'weights/weight.bin' is missing or empty")


def test_other_weights(copied):
    (copied / WEIGHTS).write_bytes(b"\0" * 4096)
    refused(copied, "is damaged: 'weights/weight.bin' is not blob storage of version 2")


@pytest.mark.parametrize("kept", [0, 63, 64, 100, 0.5, 0.999])
def test_weights_cut_short(copied, kept):
    file = copied / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    refused(copied, "is damaged: 'weights/weight.bin' is (cut short|missing or empty|not blob storage)")


def test_an_offset_past_the_end(copied):
    alter(copied, lambda value: setattr(value.blobFileValue, "offset", 2**62))
    refused(copied, "'weights/weight.bin' is cut short")


def test_an_offset_between_values(copied):
    alter(copied, lambda value: setattr(value.blobFileValue, "offset", value.blobFileValue.offset + 8))
    refused(copied, "has no value at")


def test_a_type_other_than_stored(copied):
    alter(copied, lambda value: setattr(value.type.tensorType, "dataType", 10))
    refused(copied, "is not what the program declares")


def test_a_shape_other_than_stored(copied):
    alter(copied, lambda value: setattr(value.type.tensorType.dimensions[0].constant, "size", 3))
    refused(copied, "is not what the program declares")


def test_values_of_another_count(copied):
    """In the program itself: found when the value is asked for."""
    package = open_package(copied)
    small = next(op.attributes["val"] for op in package.operations("main") if op.outputs[0].name == "small")
    small.immediateValue.tensor.ints.values.append(1)
    with pytest.raises(ExportError, match="a constant of type int32 does not fill its shape"):
        package.value(small)


def test_one_value_stands_for_all(saved):
    package = open_package(saved)
    small = next(op.attributes["val"] for op in package.operations("main") if op.outputs[0].name == "small")
    del small.immediateValue.tensor.ints.values[1:]
    np.testing.assert_array_equal(package.value(small), [3, 3])
