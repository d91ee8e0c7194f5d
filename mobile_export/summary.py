"""The table at the end of an export, and of several."""

from __future__ import annotations

from collections.abc import Sequence

from mobile_export import console
from mobile_export.export import ExportResult
from mobile_export.manifest import Manifest


def summarize(result: ExportResult) -> None:
    """Print files with sizes, parity, what stays outside the delegate, and speed on this host."""
    made = result.manifest
    rows = [(name, console.human_bytes(file.bytes), file.role) for name, file in sorted(made.files.items())]
    console.table(result.folder, ("file", "size", "role"), rows)
    console.say("")
    for name, metrics in made.quality.items():
        figures = f"KL {metrics['kl_mean']}  top-1 {metrics['top1']}"
        figures += f"  perplexity x{metrics['perplexity_ratio']}"
        console.say(f"parity   {name}: {figures}  ({metrics['positions']} positions)")
    if made.runtime.backends:
        _outside(made)
    for note in made.runtime.notes:
        console.say(f"note     {note}")
    _costs(result)


def compare(results: Sequence[ExportResult]) -> None:
    """Print one line a bundle: the artefact's size, what it lost, what it took."""
    rows = []
    for result in results:
        made = result.manifest
        size = sum(file.bytes for file in made.files.values() if file.role == "program")
        *_, (stage, metrics) = made.quality.items()
        rows.append(
            [
                result.folder,
                made.runtime.name,
                console.human_bytes(size),
                stage.removeprefix("source -> ").removesuffix(", short prompts"),
                metrics["kl_mean"],
                metrics["top1"],
                f"{result.seconds['lower']} s",
                f"{result.seconds['parity']} s",
            ]
        )
    columns = ("bundle", "runtime", "artefact", "proven as", "KL", "top-1", "lower", "parity")
    console.table("", columns, rows)


def _outside(made: Manifest) -> None:
    outside = ", ".join(f"{name} x{count}" for name, count in made.runtime.outside_backend.items())
    console.say(f"outside  {', '.join(made.runtime.backends)}: {outside}")


def _costs(result: ExportResult) -> None:
    for speed in result.speed:
        console.say(
            f"speed    {speed.threads} thread{'s' * (speed.threads > 1)}: prefill {speed.prefill} tok/s, "
            f"decode {speed.decode} tok/s, load {speed.load_seconds} s, "
            f"peak {console.human_bytes(speed.peak_bytes)}"
        )
    costs = [f"{cost['name']} {'cached' if cost['cached'] else cost['seconds']}" for cost in result.passes]
    console.say(f"cost     {', '.join(costs)}, lower {result.seconds['lower']} s")
