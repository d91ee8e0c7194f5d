"""The bench: bundles, and a peer with the same weights, on a device, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mobile_export import bundle as bundles
from mobile_export import console
from mobile_export.errors import ExportError
from mobile_export.latency import devices, peer
from mobile_export.latency.devices import Entry, Options
from mobile_export.latency.devices.host import artefact_files, launch
from mobile_export.latency.protocol import Contender, Protocol, Quality
from mobile_export.latency.reports import Report
from mobile_export.latency.workers import Launch, RemoteRunner, Worker
from mobile_export.short_golden import short_golden
from mobile_export.targets import target

if TYPE_CHECKING:
    from mobile_export.bundle import Bundle
    from mobile_export.golden import Golden
    from mobile_export.types import Checkpoint

_SAME_MODEL = 0.1
"""KL in nats above which a contender does not carry the model at all."""
PLAN, OPTIONS = Protocol(), Options()
EVALUATED = "evaluated, not run by the runtime of a device"


def parse_cpus(text: str) -> tuple[int, ...]:
    """`4,5` -> (4, 5); empty: none is named."""
    numbers = text.split(",") if text else []
    if not all(number.isdecimal() for number in numbers):
        raise ExportError(f"'{text}' is no list of cores", "write e.g. --cpus 4,5")
    return tuple(dict.fromkeys(map(int, numbers)))


def parse_threads(text: str) -> tuple[int, ...]:
    """`1,2` -> (1, 2)."""
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ExportError(f"'{text}' is no list of thread counts", "write e.g. --threads 1,2")
    return tuple(dict.fromkeys(map(int, counts)))


def bench(
    folders: Sequence[Path],
    *,
    device: str = "host",
    plan: Protocol = PLAN,
    vs: str | None = None,
    peer_python: Path | None = None,
    model: str | None = None,
    quick: bool = False,
    options: Options = OPTIONS,
) -> Report:
    """Measure bundles on a device, and with `vs="llama.cpp"` on the host that peer with the same weights.

    With a peer, each contender is first compared with the source over the golden, or with `quick`
    over its short prompts. `model` names the source where a bundle was made of a folder or file.
    Raises ExportError when bundles hold different models, the device is not to be had or is lost,
    a contender does not say what the model says, or other work keeps the device from measuring.
    """
    spec = devices.parse(device)
    if vs and spec.kind != "host":
        raise ExportError(f"{vs} runs on the host alone", "leave out --vs, or --device")
    opened = [bundles.load(folder) for folder in folders]
    context = _context(opened, plan)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    entries = _bundles(spec.kind, folders, opened)
    quality: list[Quality] = []
    with devices.open_device(spec, options) as there:
        if vs:
            found, interpreter = _source(opened[0], model), peer.python(peer_python)
            with console.step("peer: Q8_0 GGUF"):
                entries += peer.contenders(found, context, interpreter)
            golden = short_golden(found, context) if quick else _golden(found, context)
            quality = _qualities(entries, golden, max(plan.threads))
        samples = there.measure(entries, plan)
    return Report(
        **msgspec.structs.asdict(samples),
        started=started,
        device=there.info,
        protocol=plan,
        contenders=tuple(entry.contender for entry in entries),
        quality=tuple(quality),
    )


def _context(opened: Sequence[Bundle], plan: Protocol) -> int:
    """The smallest context, when all turns fit it and all bundles hold one model."""
    if len({one.manifest.model.digest for one in opened}) > 1:
        raise ExportError("these bundles hold different models", "bench bundles of one model at a time")
    context = min(one.manifest.io.context for one in opened)
    needed = max(regime.prompt + regime.decode for regime in (*plan.regimes, plan.long_regime))
    if context < needed:
        raise ExportError(
            f"a context of {context} is too short for the bench", f"export with --context {needed}"
        )
    return context


def _bundles(kind: str, folders: Sequence[Path], opened: Sequence[Bundle]) -> list[Entry]:
    """Named by their targets; by folder, or a number, where that is not one name each."""
    targets = [one.manifest.target for one in opened]
    names = targets if len(set(targets)) == len(targets) else [str(folder) for folder in folders]
    entries = []
    for index, (folder, one) in enumerate(zip(folders, opened, strict=True)):
        name = names[index] if names.count(names[index]) == 1 else f"{names[index]} #{index + 1}"
        files = [one.manifest.files[file].bytes for file in artefact_files(folder)]
        contender = Contender(
            name=name,
            runtime=one.manifest.runtime.name,
            peer=False,
            file_bytes=sum(files),
            model=one.manifest.model.digest,
            options={"recipe": one.manifest.recipe.name, "kv cache": one.manifest.io.kv_cache},
            not_speed=EVALUATED
            if hasattr(target(one.manifest.target), "ARITHMETICS") and kind != "ios"
            else "",
        )
        entries.append(Entry(contender, folder))
    return entries


def _source(bundle: Bundle, model: str | None) -> Checkpoint:
    from mobile_export.checkpoint import resolve

    checkpoint = resolve(model or bundle.manifest.model.spec)
    if checkpoint.digest != bundle.manifest.model.digest:
        raise ExportError(
            f"'{checkpoint.name}' is not the model these bundles were made of", "name that model with --model"
        )
    return checkpoint


def wide(entry: Entry) -> Launch:
    """Here, with room for every position's logits, which turns have no use for."""
    made = entry.launch or launch(entry)
    return replace(made, spec={**made.spec, "all_logits": True})


def _qualities(entries: Sequence[Entry], golden: Golden, threads: int) -> list[Quality]:
    qualities = []
    for entry in entries:
        name = entry.contender.name
        with console.step(f"quality: {name}") as cost, Worker(wide(entry)) as worker:
            runner = RemoteRunner(worker, worker.open(threads))
            qualities.append(_quality(name, runner, golden))
            cost.note = f"KL {qualities[-1].kl_mean}"
    return qualities


def _golden(checkpoint: Checkpoint, context: int) -> Golden:
    """The committed golden, else the short prompts asked of the source now."""
    from mobile_export.golden import find
    from mobile_export.prompts import load_prompts

    try:
        return find(checkpoint, load_prompts()).subset(context=context)
    except ExportError:
        return short_golden(checkpoint, context)


def _quality(name: str, runner: RemoteRunner, golden: Golden) -> Quality:
    from mobile_export.observe import observe
    from mobile_export.parity import compare

    observed = observe(runner, golden.cases, {"source": golden.observation})
    metrics = compare(golden.cases, golden.observation, observed, "source")
    if metrics.broken or metrics.kl_mean is None or metrics.kl_mean > _SAME_MODEL:
        raise ExportError(
            f"'{name}' does not say what the model says: KL {metrics.kl_mean}",
            "its speed would be of another model: make that artefact again",
        )
    return Quality(
        contender=name,
        positions=metrics.positions,
        kl_mean=metrics.kl_mean,
        top1=metrics.top1,
        greedy_mean=metrics.greedy_mean,
        greedy_tokens=max(len(case.greedy) for case in golden.cases),
    )
