"""Run the tasks: the source and each artefact, one model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export import console
from mobile_export.bundle import Bundle
from mobile_export.errors import ExportError
from mobile_export.recipe import parse_recipe
from mobile_export.targets import runners, target
from mobile_export.tasks.code import solve
from mobile_export.tasks.confine import execute
from mobile_export.tasks.perplexity import WINDOW, TextScore, nll
from mobile_export.tasks.reports import (
    SOURCE,
    Contender,
    TaskReport,
    Verdict,
    hold,
    perplexities,
    refuse_other_work,
)
from mobile_export.tasks.sets import Problems, Texts, load_problems, load_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mobile_export.types import Checkpoint, Runner


@dataclass(frozen=True)
class Work:
    """What the tasks are."""

    texts: Texts = field(default_factory=load_texts)
    problems: Problems = field(default_factory=load_problems)
    code: int | None = None
    """Problems to ask, from the first; None: all, and none where an artefact is evaluated, not run."""


def evaluate(
    bundles: Sequence[Bundle],
    *,
    model: str | None = None,
    source: bool = True,
    before: TaskReport | None = None,
    work: Work | None = None,
) -> TaskReport:
    """Perplexity and passes of each artefact, held to its recipe's `[gate]` against the source.

    `model`: the source, where the bundles were made of a folder or file. Without `source` its figures
    are those of the baseline `before`; without both nothing is held to a limit. Raises ExportError:
    the bundles are of several models, the source is another one, the baseline is of other work, or
    this machine cannot confine code.
    """
    work = work or Work()
    report = _empty(bundles, work)
    if before:
        refuse_other_work(before, report)
    if any(_problems(bundle, work) for bundle in bundles):
        execute("", "")  # a machine that cannot says so now
    ends = set(bundles[0].manifest.io.eos_ids)
    contenders = []
    if source:
        asked = max(_problems(bundle, work) for bundle in bundles)
        checkpoint = _source(bundles[0], model)
        with console.step("model in fp32"):
            runner: Runner = _hugging_face(checkpoint)
        contenders.append(_run(SOURCE, runner, checkpoint.tokenizer(), ends, work, asked, report.window))
        del runner
        gc.collect()
    elif before and before.source:
        contenders.append(msgspec.structs.replace(before.source, seconds=0.0))
    verdicts: list[Verdict] = []
    for name, bundle, runner in _artefacts(bundles):
        asked, recipe = _problems(bundle, work), bundle.manifest.recipe
        ran = _run(name, runner, _tokenizer(bundle), ends, work, asked, report.window)
        ran = msgspec.structs.replace(ran, target=bundle.manifest.target, recipe=recipe.digest)
        if contenders and contenders[0].name == SOURCE:
            verdicts += hold(contenders[0], ran, parse_recipe(dict(recipe.table)).gate)
        contenders.append(ran)
        del runner
        gc.collect()
    return msgspec.structs.replace(report, contenders=tuple(contenders), verdicts=tuple(verdicts))


def _empty(bundles: Sequence[Bundle], work: Work) -> TaskReport:
    models = {bundle.manifest.model.digest: bundle.manifest.model.name for bundle in bundles}
    if len(models) != 1:
        names = ", ".join(sorted(models.values()))
        raise ExportError(f"these bundles are of several models: {names}", "evaluate each model's by itself")
    ((digest, name),) = models.items()
    return TaskReport(
        model=name,
        checkpoint=digest,
        texts_sha256=work.texts.sha256,
        code_sha256=work.problems.sha256,
        window=min(WINDOW, *(bundle.manifest.io.context for bundle in bundles)),
        contenders=(),
    )


def _source(bundle: Bundle, model: str | None) -> Checkpoint:
    from mobile_export.checkpoint import resolve

    with console.step("model"):
        checkpoint = resolve(model or bundle.manifest.model.spec)
    if checkpoint.digest != bundle.manifest.model.digest:
        raise ExportError(
            f"'{checkpoint.name}' is not the model this bundle was made of",
            "name that model with --model",
        )
    return checkpoint


def _hugging_face(checkpoint: Checkpoint) -> Runner:
    from mobile_export.targets.source import HFRunner

    return HFRunner(checkpoint.model())


def _artefacts(bundles: Sequence[Bundle]) -> Iterator[tuple[str, Bundle, Any]]:
    """Each under a name of its own: its target and arithmetic, then its recipe, then a number."""
    taken: set[str] = set()
    for bundle in bundles:
        kind = bundle.manifest.target
        for stage, runner in runners(kind, bundle.path("program")):
            plain = stage.replace("artifact", kind, 1)
            named = f"{plain}, {bundle.manifest.recipe.name}"
            numbered = (f"{named} ({count})" for count in range(2, len(bundles) + 2))
            name = next(name for name in (plain, named, *numbered) if name not in taken)
            taken.add(name)
            yield name, bundle, runner


def _problems(bundle: Bundle, work: Work) -> int:
    """How many problems its artefact is asked: a package in the evaluator takes a second a token or so."""
    evaluated = hasattr(target(bundle.manifest.target), "ARITHMETICS")
    wanted = (0 if evaluated else len(work.problems.items)) if work.code is None else work.code
    return min(wanted, len(work.problems.items))


def _tokenizer(bundle: Bundle) -> PreTrainedTokenizerFast:
    """From the bundle's own files, as a device has them."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle.path("tokenizer")))
    if any(file.role == "chat-template" for file in bundle.manifest.files.values()):
        tokenizer.chat_template = bundle.path("chat-template").read_text("utf-8")
    return tokenizer


def _run(
    name: str,
    runner: Runner,
    tokenizer: PreTrainedTokenizerFast,
    ends: set[int],
    work: Work,
    asked: int,
    window: int,
) -> Contender:
    with console.step(f"perplexity: {name}") as texts:
        scores = []
        for text in work.texts.items:
            count, total = nll(runner, list(tokenizer(text.text)["input_ids"]), window)
            scores.append(TextScore(name=text.name, kind=text.kind, tokens=count, nll=total))
        found = perplexities(scores)
        texts.note = f"{found['all']}"
    seconds, results = texts.seconds, []
    if asked:
        with console.step(f"code: {name}") as code:
            for problem in work.problems.items[:asked]:
                results.append(solve(runner, tokenizer, ends, problem, work.problems.instruction))
        seconds += code.seconds
    return Contender(
        name=name, perplexity=found, texts=tuple(scores), code=tuple(results), seconds=round(seconds, 1)
    )
