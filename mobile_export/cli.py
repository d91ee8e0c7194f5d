"""The command line: one thin shell over the functions that Python callers use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mobile_export import __version__
from mobile_export.errors import ExportError

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
MODEL = click.option("--model", metavar="NAME|HUB_ID|FOLDER|FILE.gguf", help="Default: the catalog's.")
REVISION = click.option("--revision", help="Branch, tag or commit of a hub model.")
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mobile-export")
def cli() -> None:
    """Export a small language model to phones: one set of int8 weights, proven against the model."""


def _export_options(platform: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that every platform's command has."""
    options = (
        MODEL,
        click.option("--recipe", metavar="NAME|FILE.toml", help="How to quantize and lower. Default: int8."),
        click.option("--context", type=int, help="Positions in the KV cache. Default: the recipe's, 2048."),
        click.option("--out", type=click.Path(path_type=Path), help=f"Default: dist/MODEL{platform}."),
        REVISION,
        JSON,
    )

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


@cli.command()
@_export_options("/android")
@click.option("--measure/--no-measure", default=True, help="Measure speed on this host afterwards.")
def android(**options: Any) -> None:
    """Write an ExecuTorch bundle (.pte) for the stock Android and iOS runtimes."""
    _export("android", **options)


@cli.command()
@_export_options("/ios")
def ios(**options: Any) -> None:
    """Write a Core ML bundle (.mlpackage, iOS 18), checked by evaluating the package on this machine."""
    _export("ios", **options)


@cli.command()
@_export_options("/onnx")
def onnx(**options: Any) -> None:
    """Write an ONNX bundle (.onnx) for the stock ONNX Runtime packages of Android and iOS."""
    _export("onnx", **options)


@cli.command()
@_export_options("")
def all(as_json: bool, **options: Any) -> None:  # noqa: A001
    """Write the bundles of all platforms: traced once, quantized once, the same codes in each."""
    from mobile_export import console
    from mobile_export.export import export_all

    console.json_only(as_json)
    with console.step("all platforms") as cost:
        results = export_all(progress=_progress, **options)
    if as_json:
        _print_json({"bundles": results, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes})
    else:
        from mobile_export.summary import compare

        compare(results)


def _export(platform: str, *, as_json: bool, **options: Any) -> None:
    from mobile_export import console
    from mobile_export.export import export

    console.json_only(as_json)
    result = export(platform, progress=_progress, **options)
    if as_json:
        _print_json(result)
    else:
        from mobile_export.summary import summarize

        summarize(result)


def _progress(line: str) -> None:
    click.echo(line, err=True)


@cli.command()
@BUNDLE
@click.option("--model", help="The source, where the bundle was made of a folder or file.")
@click.option("--quick", is_flag=True, help="The short prompts only; no committed golden is needed.")
@click.option("--artifact-only", is_flag=True, help="Only the artefact against the golden.")
@click.option("--runtime", type=click.Choice(["coreml"]), help="On a Mac, untested: in Core ML itself too.")
@click.option("--device", metavar="qemu-arm64[:CPU]", help="Run the artefact there; CPU e.g. cortex-a72.")
@click.option("--baseline", type=click.Path(path_type=Path), help="A --json of before: exit 1 if worse.")
@JSON
def parity(
    bundle: Path,
    model: str | None,
    quick: bool,
    artifact_only: bool,
    runtime: str | None,
    device: str | None,
    baseline: Path | None,
    as_json: bool,
) -> None:
    """Run source, traced, quantized and artefact over the golden; exit 1 when a limit is passed."""
    from mobile_export import baseline as baselines
    from mobile_export import console
    from mobile_export.bundle import load, verify
    from mobile_export.parity import ParityReport, table
    from mobile_export.stages import STAGES, inputs
    from mobile_export.stages import parity as run

    console.json_only(as_json)
    before = baselines.read(baseline, ParityReport) if baseline else None
    opened = load(bundle)
    verify(opened)
    report = run(
        inputs(opened, model=model, short=quick, runtime=runtime, device=device),
        STAGES[-1:] if artifact_only else STAGES,
    )
    if as_json:
        _print_json(report)
    else:
        console.table(*table(report))
        if report.claim:
            console.say(report.claim)
    if not report.passed:
        click.echo(f"hint: `mobile-export blame {bundle}` finds the layer and the op", err=True)
    kept = baselines.render(baselines.of_parity(before, report)) if before else True
    sys.exit(0 if report.passed and kept else 1)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", help="The source, where the bundles were made of a folder or file.")
@click.option("--source/--no-source", default=True, help="Run the source too; else it is the baseline's.")
@click.option(
    "--code", type=click.IntRange(0), help="Problems to ask. Default: all; of a Core ML bundle none."
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the report to this file.")
@click.option("--baseline", type=click.Path(path_type=Path), help="A --json of before: exit 1 if worse.")
def evaluate(bundles: tuple[Path, ...], **options: Any) -> None:
    """Perplexity, and code that runs: source and artefacts side by side; exit 1 when a limit is passed."""
    from mobile_export.tasks.command import run

    sys.exit(0 if run(bundles, **options) else 1)


@cli.command()
@BUNDLE
@click.option("--model", help="The source, where the bundle was made of a folder or file.")
@click.option(
    "--stage",
    type=click.Choice(["traced", "rotated", "quantized", "artifact"]),
    help="Default: all in turn, until one is guilty.",
)
@JSON
def blame(bundle: Path, model: str | None, stage: str | None, as_json: bool) -> None:
    """Find the first layer and op that err more than their arithmetic explains; exit 1 when one does."""
    from mobile_export import console
    from mobile_export.blame import table, verdict
    from mobile_export.bundle import load, verify
    from mobile_export.stages import inputs
    from mobile_export.taps.blame import STAGES
    from mobile_export.taps.blame import blame as run

    console.json_only(as_json)
    opened = load(bundle)
    verify(opened)
    report = run(inputs(opened, model=model, short=True), (stage,) if stage else STAGES)
    if as_json:
        _print_json(report)
    else:
        console.table(*table(report))
        console.say(verdict(report))
    sys.exit(1 if report.guilty else 0)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--device", default="host", show_default=True, help="See `devices`.")
@click.option(
    "--device-python", default="", help="A Python there that has the runtime. Default: one is made."
)
@click.option("--vs", type=click.Choice(["llama.cpp"]), help="Measure a peer too, with the same weights.")
@click.option("--peer-python", type=click.Path(path_type=Path), help="Default: what ci/bench-peer.sh made.")
@click.option("--model", help="The source, where the bundles were made of a folder or file.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", metavar="N,N", default="1,2", show_default=True, help="Thread counts.")
@click.option("--cpus", metavar="N,N", default="", help="Pin the runtimes to these cores.")
@click.option(
    "--long",
    "long_seconds",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds of the long run that shows throttling; 0: none.",
)
@click.option("--quick", is_flag=True, help="Compare what they say on the short prompts only.")
@click.option("--busy", is_flag=True, help="Measure although other work runs on that machine.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write all samples to this file.")
@click.option("--llama-bench", type=click.Path(path_type=Path), help="Write it in llama-bench's JSON too.")
@click.option(
    "--pytorch", type=click.Path(path_type=Path), help="Write PyTorch's benchmark records (v3) too."
)
@click.option("--baseline", type=click.Path(path_type=Path), help="A --json of before: exit 1 if slower.")
@click.option("--draft", type=click.Path(path_type=Path), help="Speculative decoding: a small bundle drafts.")
@click.option("--ahead", type=click.IntRange(1), default=5, show_default=True, help="Tokens drafted at once.")
def bench(bundles: tuple[Path, ...], **options: Any) -> None:
    """Measure bundles on a device, in turns: load, first token, prefill, decode, memory."""
    if options["draft"]:
        from mobile_export.targets import SOLO_BLAS

        os.environ.update(SOLO_BLAS)
    from mobile_export.latency.command import bench as run

    sys.exit(0 if run(bundles, **options) else 1)


@cli.command()
@JSON
def devices(as_json: bool) -> None:
    """List the devices that `--device` can name now."""
    from mobile_export.latency.command import devices as show
    from mobile_export.latency.devices import discover

    found = discover()
    _print_json(found) if as_json else show(found)


@cli.command()
@BUNDLE
@click.argument("prompt")
@click.option("--system", help="System turn of the chat.")
@click.option("--raw", is_flag=True, help="Continue the text itself: no chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 (default): greedy.")
@click.option("--seed", type=int, default=0, help="For a temperature above 0.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="Default: one a core.")
def run(bundle: Path, prompt: str, **options: Any) -> None:
    """Answer a prompt with the bundle's own artefact, streaming."""
    from mobile_export.targets import SOLO_BLAS

    os.environ.update(SOLO_BLAS)
    from mobile_export.bundle import load
    from mobile_export.generate import generate

    for piece in generate(load(bundle), prompt, **options):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@JSON
@click.option("--ranges", is_flag=True, help="Core ML: run it, and list the ops nearest to fp16's end.")
def inspect(path: Path, as_json: bool, ranges: bool) -> None:
    """Verify a bundle and show what it holds; or look into a .pte, .mlpackage, .onnx, .gguf, .safetensors."""
    if ranges:
        from mobile_export import console
        from mobile_export.bundle import load
        from mobile_export.fp16_ranges import measure, rows

        found = measure(load(path))
        _print_json(found) if as_json else console.table(*rows(found))
        return
    from mobile_export.inspect import inspect as look
    from mobile_export.inspect import render

    report = look(path)
    _print_json(report) if as_json else render(report)


@cli.command()
@BUNDLE
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@JSON
def lint(bundle: Path, strict: bool, as_json: bool) -> None:
    """Verify a bundle and check it against what is known of its devices; exit 1 on an error."""
    from mobile_export.bundle import load
    from mobile_export.lint import lint as check
    from mobile_export.lint import render

    report = check(load(bundle))
    _print_json(report) if as_json else render(report)
    sys.exit(1 if report.fails(strict) else 0)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), default="report.html", show_default=True)
@click.option("--parity", multiple=True, type=click.Path(path_type=Path), help="What `parity --json` said.")
@click.option("--blame", multiple=True, type=click.Path(path_type=Path), help="What `blame --json` said.")
@click.option("--bench", multiple=True, type=click.Path(path_type=Path), help="What `bench --json` wrote.")
@click.option("--ranges", is_flag=True, help="Core ML: run it, for fp16's range by layer.")
@click.option("--json", "data", type=click.Path(path_type=Path), help="Write the same as JSON too.")
def report(bundles: tuple[Path, ...], out: Path, data: Path | None, **options: Any) -> None:
    """Write one HTML file, without scripts, of all that is known of a model's bundles."""
    from mobile_export import console
    from mobile_export.files import disk_errors, write_file
    from mobile_export.report.data import encode, gather
    from mobile_export.report.page import render

    found = gather(bundles, **options)
    with disk_errors("the report"):
        write_file(out, render(found).encode())
        if data:
            write_file(data, encode(found))
    console.say(str(out))


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check this machine: packages, processor, memory, disk, cache, tools. Exit 1 when one fails."""
    from mobile_export import doctor as checks

    found = checks.doctor()
    _print_json(found) if as_json else checks.render(found)
    sys.exit(1 if checks.worst(found) == "fail" else 0)


@cli.group()
def golden() -> None:
    """What the fp32 source model says on the prompt set."""


@golden.command()
@MODEL
@REVISION
@click.option("--out", type=click.Path(path_type=Path), help="Default: the committed goldens' folder.")
def record(model: str | None, revision: str | None, out: Path | None) -> None:
    """Record the golden of a model anew; the same model gives the same bytes."""
    from mobile_export import console
    from mobile_export.golden import pin_arithmetic

    pin_arithmetic()
    from mobile_export.checkpoint import resolve
    from mobile_export.golden import record as ask
    from mobile_export.golden import save
    from mobile_export.prompts import golden_folder, load_prompts

    checkpoint = resolve(model, revision=revision, progress=_progress)
    with console.step("golden"):
        recorded = ask(checkpoint, load_prompts(), lambda name: click.echo(f"  {name}", err=True))
    folder = (out or golden_folder()) / checkpoint.name
    save(recorded, folder)
    console.say(f"{folder}: {len(recorded.cases)} prompts, {recorded.header.positions:,} positions")


@golden.command()
@click.argument("name", default="qwen2.5-coder-0.5b-instruct")
@JSON
def show(name: str, as_json: bool) -> None:
    """Show a golden: its provenance, and each prompt with the source's greedy continuation."""
    from mobile_export import console
    from mobile_export.golden import load
    from mobile_export.prompts import golden_folder

    path = Path(name)
    found = load(path if path.is_dir() else golden_folder() / name)
    if as_json:
        _print_json(found.header)
        return
    header = found.header
    line = f"{header.model}  {header.positions:,} positions  {header.arithmetic}"
    console.say(f"{line}  {header.checkpoint[:16]}")
    rows = [(case.name, case.kind, len(case.tokens), case.greedy_text) for case in found.cases]
    console.table("", ("prompt", "kind", "tokens", "the source continues"), rows)


def _print_json(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def main(command: Callable[..., Any] = cli) -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    from mobile_export import quiet

    quiet.python()
    try:
        command(standalone_mode=False)
    except ExportError as error:
        _fail(str(error), 2)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message().rstrip('.')}; see `mobile-export --help`", 2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail("interrupted; nothing half written was kept", 130)


def _fail(line: str, code: int) -> None:
    click.echo(f"error: {line}", err=True)
    sys.exit(code)
