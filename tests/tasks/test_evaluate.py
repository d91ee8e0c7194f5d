"""Source and artefact side by side; limits; baselines: on a small model, through the command's own code."""

import json
import math
import shutil
from dataclasses import replace

import msgspec
import pytest

from mobile_export.bundle import Bundle
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
from mobile_export.recipe import ExecuTorch, Gate, load_recipe, recipe_folder
from mobile_export.targets import executorch
from mobile_export.targets.source import HFRunner
from mobile_export.tasks import confine
from mobile_export.tasks.code import CodeResult
from mobile_export.tasks.evaluate import Work, evaluate
from mobile_export.tasks.perplexity import TextScore, nll
from mobile_export.tasks.reports import Contender, TaskReport, changes, hold, perplexities, table
from mobile_export.tasks.sets import Problems, Texts, load_problems, load_texts

WORK = Work(
    texts=Texts(tuple(load_texts().items[::4]), "t"),
    problems=Problems(tuple(load_problems().items[:2]), "", "p"),
)


@pytest.fixture(scope="module")
def report(sandbox_bundle):
    return evaluate([sandbox_bundle], work=WORK)


def names(report):
    return [one.name for one in report.contenders]


def test_source_and_artefact_side_by_side(report, sandbox_bundle):
    source, artefact = report.contenders
    assert (source.name, artefact.name) == ("source", "executorch")
    assert (report.window, report.checkpoint) == (64, sandbox_bundle.manifest.model.digest)
    assert artefact.recipe == sandbox_bundle.manifest.recipe.digest
    checkpoint = resolve(sandbox_bundle.manifest.model.spec)
    tokenizer = checkpoint.tokenizer()
    for text, score in zip(WORK.texts.items, source.texts, strict=True):
        expected = nll(HFRunner(checkpoint.model()), tokenizer(text.text)["input_ids"], 64)
        assert (score.tokens, score.nll) == (expected[0], pytest.approx(expected[1], rel=1e-6))
    assert [score.tokens for score in artefact.texts] == [score.tokens for score in source.texts]
    ratio = artefact.perplexity["all"] / source.perplexity["all"]
    assert 0 < abs(ratio - 1) < 0.05
    assert set(source.perplexity) == {"all", "english", "chinese", "code"}
    assert [verdict.what for verdict in report.verdicts] == ["perplexity ratio", "passes fewer"]
    assert report.verdicts[0].measured == ratio and report.passed
    assert len(source.code) == len(artefact.code) == 2


def test_an_artefact_of_other_weights_passes_its_limit(sandbox_bundle, programs_of, spec, tmp_path):
    folder = tmp_path / "android"
    shutil.copytree(sandbox_bundle.folder, folder)
    executorch.lower(programs_of(spec(more="&seed=1"))[2], ExecuTorch(), {}, folder / "model.pte")
    report = evaluate([Bundle(folder, sandbox_bundle.manifest)], work=replace(WORK, code=0))
    (verdict,) = report.verdicts
    assert not report.passed and not verdict.passed and verdict.measured > verdict.limit == 1.05


def test_two_bundles_of_one_target_have_names_of_their_own(sandbox_bundle):
    report = evaluate([sandbox_bundle] * 3, source=False, work=replace(WORK, code=0))
    assert names(report) == ["executorch", "executorch, sandbox", "executorch, sandbox (2)"]
    assert len({json.dumps(one.perplexity) for one in report.contenders}) == 1
    assert report.verdicts == () and report.passed and report.source is None


def test_the_source_may_be_the_baselines(report, sandbox_bundle):
    again = evaluate([sandbox_bundle], source=False, before=report, work=replace(WORK, code=1))
    assert names(again) == ["source", "executorch"]
    assert again.source.seconds == 0 < report.source.seconds
    assert again.verdicts[0] == report.verdicts[0]
    assert len(again.contenders[1].code) == 1 and again.verdicts[1].measured == 0
    assert not any(change.worse for change in changes(report, again))


def test_a_baseline_of_other_work_is_refused_before_anything_runs(report, sandbox_bundle):
    for what, says in {"checkpoint": "checkpoint", "texts_sha256": "text set", "window": "window"}.items():
        other = msgspec.structs.replace(report, **{what: 5 if what == "window" else "other"})
        with pytest.raises(ExportError, match=f"another {says}; record it again"):
            evaluate([sandbox_bundle], model="no such model", before=other, work=WORK)


def test_several_models_are_refused(sandbox_bundle):
    manifest = sandbox_bundle.manifest
    other = msgspec.structs.replace(
        manifest, model=msgspec.structs.replace(manifest.model, digest="d", name="z")
    )
    with pytest.raises(ExportError, match=f"several models: {manifest.model.name}, z; evaluate each"):
        evaluate([sandbox_bundle, replace(sandbox_bundle, manifest=other)], work=WORK)
    with pytest.raises(ExportError, match="is not the model this bundle was made of; name that model"):
        evaluate([replace(sandbox_bundle, manifest=other)], work=WORK)


def test_a_machine_that_cannot_confine_says_so_first(sandbox_bundle, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(confine._SCRIPT.read_text("utf-8").replace("platform.machine()", "'sparc'"))
    monkeypatch.setattr(confine, "_SCRIPT", script)
    with pytest.raises(ExportError, match="leave the code prompts out with --code 0"):
        evaluate([sandbox_bundle], model="no such model", work=WORK)
    assert evaluate([sandbox_bundle], source=False, work=replace(WORK, code=0)).passed


def contender(name="executorch", nll=10.0, passed=(True, True, True), first=0):
    scores = (TextScore(name="a", kind="code", tokens=10, nll=nll),)
    results = tuple(
        CodeResult(name=str(at), verdict="passed" if good else "AssertionError", tokens=1, answer="")
        for at, good in enumerate(passed, first)
    )
    return Contender(name=name, perplexity=perplexities(scores), texts=scores, code=results)


@pytest.mark.parametrize(
    ("artefact", "passed"),
    [
        (contender(nll=10 + 10 * math.log(1.0099)), [True, True]),
        (contender(nll=10 + 10 * math.log(1.0101)), [False, True]),
        (contender(nll=9.0), [True, True]),
        (contender(nll=None), [False, True]),
        (contender(passed=(True, False, False)), [True, True]),
        (contender(passed=(False, False, False)), [True, False]),
        (contender(passed=()), [True]),
        (contender(passed=(False,), first=2), [True, True]),
        (contender(passed=(True,), first=7), [True, False]),
    ],
)
def test_limits(artefact, passed):
    """The last two: only problems that both were asked count, and none in common shows nothing."""
    held = hold(contender("source"), artefact, Gate(perplexity_ratio=1.01, fewer_passes=2))
    assert [verdict.passed for verdict in held] == passed


def whole(*contenders):
    head = {"model": "m", "checkpoint": "c", "texts_sha256": "t", "code_sha256": "p", "window": 64}
    return TaskReport(**head, contenders=contenders)


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        (contender(nll=10 + 10 * math.log(1.0009)), []),
        (contender(nll=10 + 10 * math.log(1.0011)), ["perplexity, all", "perplexity, code"]),
        (contender(nll=None), ["perplexity, all", "perplexity, code"]),
        (contender(passed=(True, True, False)), []),
        (contender(passed=(True, False, False)), ["passes"]),
        (contender(passed=(False,)), []),
    ],
)
def test_regressions(now, worse):
    before = whole(contender("source"), contender())
    found = changes(before, whole(now))
    assert [change.what for change in found if change.worse] == worse
    with pytest.raises(ExportError, match="nothing in common"):
        changes(before, whole(contender("onnx")))
    borrowed = msgspec.structs.replace(contender("source"), seconds=0.0)
    assert changes(before, whole(borrowed, contender("onnx"))) == []


def test_what_is_not_finite_never_passes():
    assert whole(contender()).passed and not whole(contender(nll=None)).passed and not whole().passed


@pytest.mark.parametrize("name", sorted(file.stem for file in recipe_folder().glob("*.toml")))
def test_every_recipe_says_its_limits(name):
    gate = load_recipe(name).gate
    assert 1 < gate.perplexity_ratio < 1.1 and 1 <= gate.fewer_passes <= 3
    assert "[gate]" in (recipe_folder() / f"{name}.toml").read_text("utf-8")


def test_the_table(report):
    title, columns, rows = table(report)
    assert "perplexity over" in title and len({len(columns), *map(len, rows)}) == 1
    assert [row[0] for row in rows] == ["source", "executorch"] and rows[1][-1] == "ok"


def test_the_command(cli, sandbox_bundle, tmp_path):
    out = tmp_path / "now.json"
    words = ("evaluate", sandbox_bundle.folder, "--code", "1", "--no-source")
    done = cli(*words, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "nothing was held to a limit" in done.stdout
    written = json.loads(out.read_bytes())
    assert [one["name"] for one in written["contenders"]] == ["executorch"]
    assert cli(*words, "--baseline", out).stdout.endswith("no worse than the baseline in 5 figures\n")
    for kind in written["contenders"][0]["perplexity"]:
        written["contenders"][0]["perplexity"][kind] /= 2
    out.write_text(json.dumps(written))
    done = cli(*words, "--baseline", out)
    assert done.returncode == 1 and "worse than the baseline" in done.stdout
    out.write_text("{}")
    done = cli(*words, "--baseline", out)
    assert done.returncode == 2 and "baseline 'now.json'" in done.stderr
