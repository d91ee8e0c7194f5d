import pytest
import torch
from safetensors.torch import load_file, save_file

from mobile_export.errors import ExportError
from mobile_export.tensors import map_tensors, write_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "codes": torch.randint(-127, 127, (3, 5), dtype=torch.int8),
        "wide": torch.rand(4, 4, dtype=torch.float64),
        "half": torch.rand(7).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 8),
        "é": torch.arange(4),
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_the_safetensors_library_reads_what_we_write(tmp_path, tensors):
    write_tensors(tmp_path / "ours.safetensors", tensors)
    assert same(load_file(tmp_path / "ours.safetensors"), tensors)


def test_we_read_what_the_safetensors_library_writes(tmp_path, tensors):
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert same(map_tensors(tmp_path / "theirs.safetensors"), tensors)


def test_same_tensors_same_bytes_in_any_order(tmp_path, tensors):
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_each_tensor_has_its_own_storage_and_never_writes_to_the_file(tmp_path, tensors):
    write_tensors(tmp_path / "a", tensors)
    before = (tmp_path / "a").read_bytes()
    read = map_tensors(tmp_path / "a")
    assert read["wide"].untyped_storage().nbytes() == 4 * 4 * 8
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read.values())
    read["wide"].zero_()
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    write_tensors(tmp_path / "a", tensors)
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:keep])
    with pytest.raises(ExportError, match="'a' is not a whole safetensors file"):
        map_tensors(tmp_path / "a")


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}',
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[-4,12]}}',
        b'{"x":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}}',
        b'{"x":3}',
        b"[1]",
        b"\xff",
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header):
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        map_tensors(tmp_path / "a")


def test_a_type_torch_does_not_have_is_named(tmp_path):
    header = b'{"x":{"dtype":"WAT","shape":[4],"data_offsets":[0,16]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ExportError, match="'a' has tensors of type WAT; save them as"):
        map_tensors(tmp_path / "a")
