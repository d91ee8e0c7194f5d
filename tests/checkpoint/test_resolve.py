import os
import shutil
import subprocess
import sys

import pytest

from mobile_export.checkpoint import catalog, resolve
from mobile_export.errors import ExportError


def test_a_path_wins_over_a_name(sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sandbox().folder, catalog.default_name())
    checkpoint = resolve(catalog.default_name())
    assert checkpoint.provenance == {"kind": "folder"} and checkpoint.digest == sandbox().digest
    monkeypatch.chdir(catalog.default_name())
    assert resolve(".").name == catalog.default_name()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("qwen2.5-coder-0.5b-instrukt", "did you mean 'qwen2.5-coder-0.5b-instruct'?"),
        ("nothing", "known: "),
        ("", "unknown model ''"),
        ("missing/model.gguf", "there is no file or folder 'missing/model.gguf'"),
        ("./missing", "there is no file or folder './missing'"),
        ("/missing/folder", "there is no file or folder '/missing/folder'"),
        ("x" * 300, "cannot read"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("org/../name", "unknown model"),
        ("a\0b", "unknown model"),
    ],
)
def test_unknown(spec, says, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError) as error:
        resolve(spec)
    assert says in str(error.value)


@pytest.mark.parametrize("spec", ["sandbox:qwen2?layers=1", None])
def test_revision_is_for_hub_models(spec, cache):
    with pytest.raises(ExportError, match="leave out --revision"):
        resolve(spec, revision="main")


SMALL_FILES = """
import resource, signal
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    resolve("sandbox:qwen2?layers=2&hidden=64&vocab=512")
except ExportError as error:
    print(error)
"""


def test_no_room_in_the_cache(cache):
    env = {**os.environ, "MOBILE_EXPORT_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", SMALL_FILES], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("cannot write the model cache (MOBILE_EXPORT_CACHE): File too large"), done
    assert list((cache / "checkpoints").iterdir()) == []


def test_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBILE_EXPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ExportError, match="cannot write the model cache .*: Not a directory"):
        resolve("sandbox:qwen2?layers=1")
