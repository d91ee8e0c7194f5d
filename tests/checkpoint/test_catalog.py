from pathlib import Path

import pytest

from mobile_export.checkpoint import catalog
from mobile_export.checkpoint.folder import safe_name
from mobile_export.errors import ExportError

ROOT = Path(__file__).parents[2]


def test_names_are_unique_and_safe():
    names = catalog.names()
    assert len(set(names)) == len(names)
    assert [safe_name(name) for name in names] == names
    assert catalog.default_name() in names


def test_every_model_has_a_notice():
    notice = (ROOT / "NOTICE").read_text()
    for model in catalog.load().model:
        assert model.title in notice and model.title in model.notice
        assert model.license == "Apache-2.0" and "Apache License" in model.notice


def test_parts_are_members_of_their_own_wheel():
    for model in catalog.load().model:
        for part in getattr(model, "parts", ()):
            stem = f"{part.package.replace('-', '_')}"
            assert part.wheel == f"{stem}-{part.version}-py3-none-any.whl"
            assert part.member.startswith(f"{stem}/")
            assert len(part.sha256) == 64


def test_default_is_the_pinned_file():
    model = catalog.load().model[0]
    assert model.name == catalog.default_name()
    assert model.size == 491_400_064
    assert model.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def test_unknown_name():
    with pytest.raises(ExportError, match="did you mean 'qwen3-0.6b'"):
        catalog.resolve("qwen3-0.6", None, print)
