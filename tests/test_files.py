import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mobile_export import files
from mobile_export.errors import ExportError


def names(folder):
    return [entry.name for entry in folder.iterdir()]


def script(body):
    return [sys.executable, "-c", textwrap.dedent(body)]


BUILD = """
    import sys, time
    from pathlib import Path
    from mobile_export.files import new_folder
    with new_folder(Path(sys.argv[1])) as folder:
        (folder / "part").write_bytes(b"half")
        print("ready", flush=True)
        time.sleep(60)
"""


def stop_midway(path, how):
    process = subprocess.Popen([*script(BUILD), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, how)
    process.communicate(timeout=30)
    return process


def test_a_killed_process_leaves_the_older_folder_whole_and_is_swept_up(tmp_path):
    path = tmp_path / "bundle"
    with files.new_folder(path) as folder:
        (folder / "old").write_bytes(b"whole")
    killed = stop_midway(path, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert names(path) == ["old"]
    assert (tmp_path / f".bundle.{killed.pid}.tmp").is_dir()
    with files.new_folder(path) as folder:
        (folder / "new").write_bytes(b"whole")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["bundle"]


def test_ctrl_c_leaves_nothing(tmp_path):
    interrupted = stop_midway(tmp_path / "bundle", signal.SIGINT)
    assert interrupted.returncode != 0
    assert names(tmp_path) == []


def test_a_process_killed_in_mid_swap_is_repaired(tmp_path):
    gone = subprocess.Popen(script("pass"))
    gone.wait()
    old = tmp_path / f".bundle.{gone.pid}.old.tmp"
    old.mkdir()
    (old / "kept").write_bytes(b"")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "bundle"):
        raise RuntimeError
    assert names(tmp_path / "bundle") == ["kept"]


def test_a_leftover_with_our_own_process_id_is_swept_up(tmp_path):
    (tmp_path / f".bundle.{os.getpid()}.tmp").mkdir()
    with files.new_folder(tmp_path / "bundle") as folder:
        (folder / "new").write_bytes(b"")
    assert names(tmp_path) == ["bundle"]


def test_the_work_of_a_living_process_is_left_alone(tmp_path):
    living = tmp_path / f".bundle.{os.getppid()}.tmp"
    living.mkdir()
    with files.new_folder(tmp_path / "bundle"):
        pass
    assert living.is_dir()


def test_a_full_disk_is_one_line(tmp_path):
    refused = pytest.raises(ExportError, match="cannot write model.pte: No space left on device; free some")
    with refused, files.disk_errors("model.pte"), Path("/dev/full").open("wb") as full:
        full.write(b"x" * 100_000)
    with pytest.raises(FileNotFoundError), files.disk_errors("model.pte"):
        (tmp_path / "missing").read_bytes()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ExportError, match="leads out of its folder"):
        files.inside(tmp_path, name)


def test_write_file_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "manifest.json"
    files.write_file(path, b"one")
    with pytest.raises(TypeError):
        files.write_file(path, "not bytes")
    assert path.read_bytes() == b"one" and names(tmp_path) == ["manifest.json"]
