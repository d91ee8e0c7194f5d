import os
import pty
import re
import subprocess
import sys

import pytest

from mobile_export import console


def test_step_measures_time_and_the_memory_it_touched(capsys):
    with console.step("fill") as cost:
        block = bytearray(os.urandom(1) * 80_000_000)
        cost.note = "cached"
    del block
    assert cost.peak_bytes > 80_000_000
    assert cost.seconds > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fill  ")
    assert re.search(r" s  peak [0-9.]+ [MG]B  cached\n$", captured.err)


def test_peak_is_of_this_step_not_of_an_earlier_one():
    with console.step("large") as large:
        block = bytearray(os.urandom(1) * 200_000_000)
    del block
    with console.step("small") as small:
        pass
    assert small.peak_bytes < large.peak_bytes - 100_000_000


def test_step_that_raises_says_so_and_lets_the_error_pass(capsys):
    with pytest.raises(KeyboardInterrupt), console.step("trace"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("trace  failed after ")


def test_results_go_to_stdout_unless_it_is_kept_for_json(capsys):
    console.say("[bold]as is[/bold]")
    console.table("Files", ["name", "size"], [["a" * 200, 1]])
    captured = capsys.readouterr()
    assert captured.out.startswith("[bold]as is[/bold]\nFiles")
    assert "a" * 200 in captured.out and captured.err == ""
    assert all(line == line.rstrip() for line in captured.out.splitlines())
    console.json_only()
    try:
        console.say("progress")
        console.table("Files", ["name"], [["x"]])
    finally:
        console.json_only(False)
    captured = capsys.readouterr()
    assert captured.out == "" and "progress" in captured.err


def test_bar_reports_each_quarter_when_piped(capsys):
    with console.bar("download", 400_000_000) as advance:
        for _ in range(40):
            advance(10_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "download  25 %  100.0 MB of 400.0 MB"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (491_400_064, "491.4 MB"), (2**41, "2.2 TB")],
)
def test_human_bytes(count, text):
    assert console.human_bytes(count) == text


def test_steps_and_bars_nest_on_a_terminal():
    code = (
        "from mobile_export import console\n"
        "with console.step('outer'):\n"
        "    with console.bar('bytes', 10) as advance:\n"
        "        advance(10)\n"
        "    with console.step('inner'):\n"
        "        pass\n"
        "console.say('result')\n"
    )
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=follower,
        timeout=60,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert done.returncode == 0 and done.stdout == b"result\n"
    assert re.search(r"inner  0\.\d s  peak ", shown) and re.search(r"outer  0\.\d s  peak ", shown)


def test_a_table_without_title_and_names_is_its_rows_only(capsys):
    console.table("", ["", ""], [["a", 1], ["bb", 2]])
    assert capsys.readouterr().out == "a   1\nbb  2\n"
