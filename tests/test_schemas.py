"""The committed JSON Schemas are those of the structs."""

import json
import subprocess
import sys

import jsonschema
import pytest

from mobile_export import schemas

FILES = schemas.files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_schema_is_its_structs_own(path):
    assert path.read_bytes() == FILES[path], "run python -m mobile_export.schemas"
    jsonschema.Draft202012Validator.check_schema(json.loads(FILES[path]))


def test_no_schema_is_left_over():
    assert sorted(schemas.FOLDER.glob("*.json")) == sorted(FILES)


def test_the_command_writes_what_is_committed():
    before = {path: path.read_bytes() for path in FILES}
    subprocess.run([sys.executable, "-m", "mobile_export.schemas"], check=True)
    assert {path: path.read_bytes() for path in FILES} == before
