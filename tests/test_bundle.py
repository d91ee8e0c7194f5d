import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import msgspec
import pytest

from mobile_export import bundle, manifest, schemas
from mobile_export.errors import ExportError
from mobile_export.recipe import load_recipe


def make_manifest():
    recipe = load_recipe()
    tensor = manifest.TensorInfo(name="tokens", dtype="int64", shape=[1, "length"])
    return manifest.Manifest(
        platform="android",
        target="executorch",
        model=manifest.Model(
            name="small", spec="sandbox:qwen2", family="qwen2", license="CC0-1.0", digest="0" * 64
        ),
        recipe=manifest.RecipeUsed(name=recipe.name, digest=recipe.digest, table=msgspec.to_builtins(recipe)),
        tools=manifest.tool_versions("torch", "executorch"),
        runtime=manifest.Runtime(name="executorch", minimum_version="1.4.0", backends=["XnnpackBackend"]),
        io=manifest.Contract(
            methods=[manifest.Method(name="forward", inputs=[tensor], outputs=[tensor])],
            constant_methods={"get_max_seq_len": 128, "get_eos_ids": [2, 3], "use_kv_cache": True},
            context=128,
            vocab=512,
            kv_cache="fp32",
            eos_ids=[2, 3],
            bos_id=None,
            normalize="NFC",
        ),
        quality={"artifact": {"kl_mean": 0.00123, "top1": 0.99}},
    )


def make_bundle(out, program=b"program"):
    with bundle.create(out) as draft:
        draft.path("model.pte", "program").write_bytes(program)
        draft.path("parts/selftest.json", "selftest").write_text("{}")
        draft.finish(make_manifest())
    return bundle.load(out)


@pytest.fixture
def made(tmp_path):
    return make_bundle(tmp_path / "android")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_bundle_is_written_loaded_and_verified(made):
    bundle.verify(made)
    assert names(made.folder) == ["manifest.json", "model.pte", "parts"]
    assert made.path("program").read_bytes() == b"program"
    assert made.bytes == 9
    assert msgspec.structs.replace(made.manifest, files={}) == make_manifest()
    with pytest.raises(ExportError, match="this bundle has no chat-template"):
        made.path("chat-template")


def test_same_content_same_bytes_sorted_and_ending_in_a_newline(made, tmp_path):
    data = (made.folder / "manifest.json").read_bytes()
    make_bundle(tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == data
    assert data.endswith(b"\n}\n") and b'\n  "files"' in data

    def refuse_unsorted(pairs):
        assert [key for key, _ in pairs] == sorted(key for key, _ in pairs)

    json.loads(data, object_pairs_hook=refuse_unsorted)


def test_the_committed_schema_accepts_a_manifest(made):
    schema = json.loads((schemas.FOLDER / "manifest.schema.json").read_bytes())
    validator = jsonschema.Draft202012Validator(schema)
    parsed = json.loads((made.folder / "manifest.json").read_bytes())
    validator.validate(parsed)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**parsed, "schema_version": 2})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**parsed, "extra": 1})


def rewrite(made, change):
    parsed = json.loads((made.folder / "manifest.json").read_bytes())
    change(parsed)
    (made.folder / "manifest.json").write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(schema_version=7),
            "schema version is 7, and this version of mobile-export reads 1",
        ),
        (lambda m: m.update(format="zip"), "is not a bundle of mobile-export"),
        (lambda m: m.update(extra=1), "manifest.json is damaged: Object contains unknown field `extra`"),
        (lambda m: m["io"].pop("vocab"), "manifest.json is damaged: Object missing required field `vocab`"),
    ],
)
def test_a_manifest_this_version_cannot_read(made, change, message):
    rewrite(made, change)
    with pytest.raises(ExportError) as caught:
        bundle.load(made.folder)
    assert message in caught.value.message


def test_no_manifest_or_half_of_one(made, tmp_path):
    data = (made.folder / "manifest.json").read_bytes()
    (made.folder / "manifest.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match="manifest.json is damaged"):
        bundle.load(made.folder)
    with pytest.raises(ExportError, match="there is no folder 'nothing'"):
        bundle.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="'empty' is not a bundle: it has no manifest.json"):
        bundle.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda f: (f / "model.pte").write_bytes(b"Program"), "'model.pte' was altered: its sha256 differs"),
        (lambda f: (f / "model.pte").write_bytes(b"progra"), "'model.pte' has 6 bytes, not 7"),
        (lambda f: (f / "model.pte").unlink(), "the bundle lacks 'model.pte'"),
        (lambda f: (f / ".hidden").write_bytes(b""), "a file its manifest does not list: '.hidden'"),
        (lambda f: (f / "parts" / "x").write_bytes(b""), "a file its manifest does not list: 'parts/x'"),
        (lambda f: (f / "more").symlink_to("/"), "a file its manifest does not list: 'more'"),
    ],
)
def test_a_file_that_is_not_as_listed(made, alter, message):
    alter(made.folder)
    with pytest.raises(ExportError) as caught:
        bundle.verify(bundle.load(made.folder))
    assert message in caught.value.message


def test_a_link_is_refused_even_to_the_same_bytes(made, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (made.folder / "model.pte").rename(elsewhere)
    (made.folder / "model.pte").symlink_to(elsewhere)
    with pytest.raises(ExportError, match="leads out of its folder|is a link"):
        bundle.verify(bundle.load(made.folder))
    with pytest.raises(ExportError, match="leads out of its folder"):
        bundle.load(made.folder).path("program")


@pytest.mark.parametrize(
    "name", ["../model.pte", "/etc/hostname", "a/../model.pte", "./model.pte", "a\\b", "c:x", ""]
)
def test_a_path_that_leads_out_is_refused(made, name):
    rewrite(made, lambda m: m["files"].update({name: m["files"].pop("model.pte")}))
    with pytest.raises(ExportError, match="cannot be a file of a bundle"):
        bundle.verify(bundle.load(made.folder))
    with pytest.raises(ExportError, match="cannot be a file of a bundle"):
        bundle.Draft(made.folder).path(name, "program")


def test_an_error_or_ctrl_c_leaves_the_older_bundle(made):
    for error in (RuntimeError, KeyboardInterrupt, ExportError):
        with pytest.raises(error), bundle.create(made.folder) as draft:
            draft.path("model.pte", "program").write_bytes(b"new")
            draft.finish(make_manifest())
            raise error("x", "y") if error is ExportError else error
    bundle.verify(bundle.load(made.folder))
    assert made.path("program").read_bytes() == b"program"
    assert names(made.folder.parent) == ["android"]


def test_a_file_changed_after_the_manifest_is_noticed_before_anyone_sees_it(tmp_path):
    with pytest.raises(ExportError, match="was altered|has 5 bytes"), bundle.create(tmp_path / "b") as draft:
        path = draft.path("model.pte", "program")
        path.write_bytes(b"right")
        draft.finish(make_manifest())
        path.write_bytes(b"wrong")
    assert names(tmp_path) == []


def test_quality_can_be_added_after_it_was_measured_on_the_files(tmp_path):
    with bundle.create(tmp_path / "b") as draft:
        draft.path("model.pte", "program").write_bytes(b"x")
        unproven = draft.finish(msgspec.structs.replace(make_manifest(), quality={}))
        assert unproven.path("program").read_bytes() == b"x"
        draft.finish(make_manifest())
    assert bundle.load(tmp_path / "b").manifest.quality["artifact"]["top1"] == 0.99


def test_a_folder_that_is_not_a_bundle_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for name in ("photos", "file"):
        with pytest.raises(ExportError, match=f"'{name}' exists and is not a bundle; choose another --out"):
            make_bundle(tmp_path / name)
    assert names(tmp_path / "photos") == ["one.jpg"]
    (tmp_path / "empty").mkdir()
    bundle.verify(make_bundle(tmp_path / "empty"))
    bundle.verify(make_bundle(tmp_path / "empty", b"newer"))


KILLED = """
    import sys, time
    from pathlib import Path
    from test_bundle import bundle, make_manifest
    with bundle.create(Path(sys.argv[1])) as draft:
        draft.path("model.pte", "program").write_bytes(b"half")
        draft.finish(make_manifest())
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_process_stopped_midway_leaves_the_older_bundle(made, how):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(made.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(how)
    bundle.verify(bundle.load(made.folder))
    assert made.path("program").read_bytes() == b"program"
    make_bundle(made.folder, b"next")
    assert names(made.folder.parent) == ["android"]


@contextmanager
def small_disk(folder):
    """A disk of 1 MB where we may mount one; else files of at most 100 kB."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted.returncode:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_nothing_is_visible(tmp_path):
    with small_disk(tmp_path / "disk"):
        make_bundle(tmp_path / "disk" / "android", b"small")
        with pytest.raises(ExportError) as caught:
            make_bundle(tmp_path / "disk" / "android", bytes(2_000_000))
        assert caught.value.message in (
            "cannot write the bundle: No space left on device",
            "cannot write the bundle: File too large",
        )
        assert names(tmp_path / "disk") == ["android"]
        assert bundle.load(tmp_path / "disk" / "android").path("program").read_bytes() == b"small"


def test_a_place_that_cannot_be_written_is_one_line():
    with pytest.raises(ExportError, match="cannot write the bundle: "):
        make_bundle(Path("/dev/null/android"))
