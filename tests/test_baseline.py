"""Regressions: found when a figure is worse by more than its tolerance, and only then."""

import json
from dataclasses import replace

import msgspec
import pytest

from mobile_export import baseline
from mobile_export.errors import ExportError
from mobile_export.parity import Metrics, ParityReport, stage_result

METRICS = Metrics(
    positions=100,
    broken=0,
    kl_mean=0.004,
    kl_p99=0.05,
    kl_max=0.1,
    top1=0.96,
    dlogit_max=1.0,
    logsumexp_shift_max=0.5,
    perplexity_ratio=1.01,
    greedy_mean=20.0,
    greedy_min=1,
    greedy_whole=1,
    cases=4,
)


def report(**more):
    metrics = msgspec.structs.replace(METRICS, **more)
    lines = (
        stage_result("artifact", "golden", metrics, None),
        stage_result("source", "golden", METRICS, None),
    )
    return ParityReport(model="m", checkpoint="c", target="executorch", recipe="r", stages=lines)


def worse(now, before=None):
    changes = baseline.of_parity(before or report(), now)
    assert len(changes) == 6
    return [(change.where, change.what) for change in changes if change.worse]


@pytest.mark.parametrize(
    ("what", "same", "other"),
    [
        ("kl_mean", 0.00419, 0.00421),
        ("top1", 0.9581, 0.9579),
        ("perplexity_ratio", 1.011, 1.0111),
    ],
)
def test_each_figure_has_its_tolerance(what, same, other):
    assert worse(report(**{what: same})) == []
    assert worse(report(**{what: other})) == [("golden -> artifact", what)]
    assert worse(report(), before=report(**{what: other})) == [], "better is not worse"


def test_what_is_not_finite_is_worse_than_any_number():
    assert worse(report(kl_mean=None)) == [("golden -> artifact", "kl_mean")]
    assert worse(report(kl_mean=None), before=report(kl_mean=None)) == []
    assert worse(report(), before=report(kl_mean=None)) == []


@pytest.mark.parametrize("what", ["model", "checkpoint", "target"])
def test_other_work_is_refused(what):
    other = msgspec.structs.replace(report(), **{what: "other"})
    with pytest.raises(ExportError, match=f"another {what}; record it again"):
        baseline.of_parity(other, report())


def test_other_positions_are_nothing_in_common():
    short = msgspec.structs.replace(report(), stages=report(positions=3).stages[:1])
    with pytest.raises(ExportError, match="nothing in common"):
        baseline.of_parity(short, report())


def test_another_recipe_is_what_it_is_for():
    assert baseline.of_parity(msgspec.structs.replace(report(), recipe="other"), report())


def test_reading(tmp_path):
    path = tmp_path / "before.json"
    with pytest.raises(ExportError, match="cannot read baseline 'before.json'"):
        baseline.read(path, ParityReport)
    path.write_bytes(msgspec.json.encode(report()))
    assert baseline.read(path, ParityReport) == report()
    path.write_text(json.dumps({"schema": 1, "stages": []}))
    with pytest.raises(ExportError, match="baseline 'before.json': .*model.*; name a file that --json"):
        baseline.read(path, ParityReport)
    path.write_bytes(b"\xff{")
    with pytest.raises(ExportError, match="baseline 'before.json'"):
        baseline.read(path, ParityReport)


def test_what_is_printed(capsys):
    changes = baseline.of_parity(report(), report(kl_mean=0.1))
    assert baseline.render(changes) is False
    assert capsys.readouterr().out.splitlines()[1].split() == (
        ["golden", "->", "artifact", "kl_mean", "0.004", "0.1"]
    )
    assert baseline.render([replace(change, worse=False) for change in changes]) is True
    assert capsys.readouterr().out == "no worse than the baseline in 6 figures\n"
