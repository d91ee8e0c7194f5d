"""Symbols of a real library, read by the reader that finds what is missing."""

import shutil
import subprocess

import pytest

from mobile_export.latency.stubs import missing, symbols


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_symbols_with_versions(tmp_path):
    (tmp_path / "a.c").write_text("#include <string.h>\nsize_t twice(char *s) { return 2 * strlen(s); }\n")
    (tmp_path / "b.c").write_text("unsigned long strlen(char *s) { return *s; }\n")
    for name in ("a", "b"):
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-fno-builtin",
            "-o",
            tmp_path / f"{name}.so",
            tmp_path / f"{name}.c",
        ]
        subprocess.run(command, check=True)
    asked, given = symbols((tmp_path / "a.so").read_bytes())
    assert b"twice" in given and asked[b"strlen"].startswith(b"GLIBC_")
    assert missing([tmp_path / "a.so"], []).keys() == asked.keys()
    assert b"strlen" not in missing([tmp_path / "a.so"], [tmp_path / "b.so"])
