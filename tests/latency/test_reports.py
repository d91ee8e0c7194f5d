"""The report's own schema, and the same report in other people's words."""

import json

import jsonschema
import msgspec
import pytest

from mobile_export import schemas
from mobile_export.cli import cli
from mobile_export.errors import ExportError
from mobile_export.latency import command, compare, exporters, reports, tables
from mobile_export.latency.protocol import (
    Check,
    Contender,
    DeviceInfo,
    FirstToken,
    Load,
    LongRun,
    Machine,
    Memory,
    Protocol,
    Regime,
    State,
    Turn,
)

SPEEDS = (100, 104, 98, 102, 100)
"""Milliseconds of each round's prefill; a token takes a tenth."""


def report(scale=1.0, speeds=SPEEDS, **changes):
    """A run of five rounds whose every time is known; `scale` makes it that much slower."""
    ours = {"contender": "executorch", "threads": 2}
    times = [int(scale * one * 1e6) for one in speeds]
    turns = [
        turn
        for number, ns in enumerate(times)
        for turn in (
            Turn(**ours, round=number, prompt=32, prefill_ns=ns, decode_ns=(), tokens=(5,)),
            Turn(
                **ours, round=number, prompt=0, prefill_ns=0, decode_ns=(ns // 10, ns // 5), tokens=(7, 5, 6)
            ),
        )
    ]
    made = reports.Report(
        started="2026-11-25T10:00:00+00:00",
        device=DeviceInfo(name="host", kind="host"),
        machine=Machine(
            cpu="Cortex-A72", cores=4, memory_bytes=4 << 30, system="Linux", versions={"executorch": "1.4.1"}
        ),
        protocol=Protocol(threads=(2,), regimes=(Regime(prompt=32), Regime(prompt=0, decode=2))),
        contenders=(
            Contender(
                name="executorch",
                runtime="ExecuTorch",
                peer=False,
                file_bytes=5 * 10**8,
                model="ab" * 32,
                options={"recipe": "int8", "kv cache": "fp32"},
            ),
        ),
        states=(State(threads=2, round=0, when="before", thermal="none"),),
        checks=(Check(**ours, matched=60, expected=60),),
        loads=tuple(Load(**ours, kind=kind, ns=times[0] * 10, cached=0.0) for kind in ("cold", "warm")),
        memory=(Memory(**ours, floor_bytes=10**8, peak_bytes=7 * 10**8),),
        turns=tuple(turns),
        first_tokens=(FirstToken(**ours, round=0, tokens=100, tokenize_ns=10**6, prefill_ns=times[0]),),
        long_runs=(LongRun(**ours, decode_ns=((10, 20), (11, 21))),),
    )
    return msgspec.structs.replace(made, **changes)


EMULATED = DeviceInfo(name="qemu-arm64", kind="qemu-arm64", not_speed="emulated by qemu")


def test_the_committed_schema_holds_for_a_report():
    document = json.loads(msgspec.json.encode(report()))
    schema = json.loads((schemas.FOLDER / "bench.schema.json").read_bytes())
    jsonschema.validate(document, schema)
    del document["machine"]["cpu"]
    with pytest.raises(jsonschema.ValidationError, match="'cpu' is a required property"):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize(("percent", "value"), [(50, 30), (90, 50), (99, 50), (20, 10), (21, 20), (0, 10)])
def test_percentiles_are_nearest_ranks(percent, value):
    assert reports.percentile([50, 10, 40, 20, 30], percent) == value


def test_llama_bench_has_its_own_names():
    prefill, decode = exporters.llama_bench(report())
    assert (prefill["n_prompt"], prefill["n_gen"], prefill["n_depth"]) == (32, 0, 0)
    assert (decode["n_prompt"], decode["n_gen"], decode["n_depth"]) == (0, 2, 0)
    assert prefill["samples_ns"] == [one * 10**6 for one in SPEEDS]
    assert prefill["avg_ns"] == 100_800_000 and prefill["stddev_ns"] == round(5.2**0.5 * 1e6)
    assert prefill["avg_ts"] == pytest.approx(sum(32e3 / one for one in SPEEDS) / 5)
    assert decode["samples_ts"][0] == pytest.approx(2 / 0.03)
    assert prefill["test_time"] == "2026-11-25T10:00:00Z" and prefill["type_k"] == "f32"


def test_pytorch_records_have_a_value_a_round():
    records = {record["metric"]["name"]: record for record in exporters.pytorch_v3(report())}
    assert records["prefill_32_tokens_per_sec"]["metric"]["benchmark_values"][0] == pytest.approx(320)
    assert records["cold_load_ms"]["metric"]["benchmark_values"] == [1000]
    assert records["time_to_first_token_of_text_ms"]["metric"]["benchmark_values"] == [101]
    assert records["peak_memory_mb"]["metric"]["benchmark_values"] == [700]
    one = records["decode_2_tokens_per_sec"]
    assert one["benchmark"]["mode"] == "inference" and one["model"]["backend"] == "ExecuTorch"
    assert one["runners"][0]["cpu_info"] == "Cortex-A72" and one["timestamp"] == 1795600800
    assert one["dependencies"] == {"executorch": {"version": "1.4.1"}}


def test_what_is_no_speed_is_never_shown_as_one(capsys):
    evaluated = [msgspec.structs.replace(one, not_speed="evaluated, not run") for one in report().contenders]
    for labelled in (report(device=EMULATED), report(contenders=tuple(evaluated))):
        tables.render(labelled)
        shown = capsys.readouterr().out
        assert "not a speed" in shown and "source's tokens 60, at export 60" in shown
        assert "tokens a second" not in shown and " ms" not in shown and "GB/s" not in shown
        for exporter in (exporters.llama_bench, exporters.pytorch_v3):
            with pytest.raises(ExportError, match="nothing in this report is a speed: e"):
                exporter(labelled)


def test_slower_by_more_than_five_percent_and_three_spreads():
    def slower(now, before=None):
        changes = compare.compare(before or report(), now)
        return sorted(change.what for change in changes if change.slower)

    assert slower(report()) == []
    # One sample has no spread. Rounds differ by 3 ms around 100: 8 % more is no more than that explains.
    single = ["cold load", "first token of a text", "warm load"]
    assert slower(report(1.08)) == single
    assert slower(report(1.12)) == sorted([*single, "decode at 0, a token", "prefill 32"])
    assert slower(report(0.5)) == []
    quiet = (100, 100, 100, 100, 100)
    assert slower(report(1.04, quiet), report(1.0, quiet)) == []
    assert "prefill 32" in slower(report(1.06, quiet), report(1.0, quiet))


def test_a_table_of_what_got_slower(capsys):
    compare.render(compare.compare(report(), report(1.5)))
    assert "slower than the baseline" in (shown := capsys.readouterr().out) and "x1.50" in shown
    compare.render(compare.compare(report(), report()))
    assert "no slower than the baseline in 5 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": Protocol(threads=(2,))}, "they differ in regimes"),
        ({"protocol": msgspec.structs.replace(report().protocol, threads=(1,))}, "they differ in threads"),
        ({"machine": msgspec.structs.replace(report().machine, cpu="Cortex-A76")}, "differ in processor"),
        ({"device": DeviceInfo(name="ssh:pi@board", kind="ssh")}, "differ in kind of device"),
        ({"device": EMULATED}, "this run has no speeds: qemu-arm64 is emulated by qemu"),
        (
            {"contenders": (msgspec.structs.replace(report().contenders[0], model="cd" * 32),)},
            "they differ in model",
        ),
        ({"turns": (), "loads": (), "first_tokens": ()}, "nothing timed in common; the baseline measured ex"),
    ],
)
def test_other_work_is_not_compared(changes, reason):
    with pytest.raises(ExportError, match=reason):
        compare.compare(report(), report(**changes))


def test_throttling_is_the_last_tenth_over_the_first():
    assert tables.throttling([[10, 10]] * 9 + [[99, 99], *[[10, 10]] * 8, [14, 14], [16, 16]]) == 1.5
    assert tables.throttling([[10, 30, 20]]) == 1.0


def test_slower_than_the_baseline_exits_1(tmp_path, monkeypatch, capsys):
    reports.save(report(), tmp_path / "before.json")
    runs = [report(1.5), report()]
    monkeypatch.setattr(command, "measure", lambda bundles, **options: runs.pop(0))
    for code in (1, 0):
        with pytest.raises(SystemExit) as done:
            cli.main(["bench", "a", "--baseline", str(tmp_path / "before.json")], standalone_mode=True)
        assert done.value.code == code
    assert "slower than the baseline" in capsys.readouterr().out


def test_a_baseline_is_read_before_anything_is_measured(tmp_path):
    with pytest.raises(ExportError, match="cannot read 'none.json'"):
        cli.main(["bench", "a", "--baseline", str(tmp_path / "none.json")], standalone_mode=False)
