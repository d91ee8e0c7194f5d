"""A bundle's model card: what its manifest says, as Markdown with the metadata of model hubs.

Metadata: https://huggingface.co/docs/hub/model-cards (YAML between two lines of dashes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mobile_export.manifest import Manifest, Method, Scalar, TensorInfo

_FIGURES = {
    "positions": "positions",
    "kl_mean": "KL mean",
    "kl_max": "KL max",
    "top1": "top-1",
    "perplexity_ratio": "perplexity ratio",
}


def model_card(manifest: Manifest) -> str:
    """The card of a bundle whose files need not be listed yet; the same manifest gives the same text."""
    sections = (_metadata, _what, _needs, _calls, _quality, _provenance)
    return "\n\n".join("\n".join(section(manifest)) for section in sections) + "\n"


def _metadata(manifest: Manifest) -> Iterator[str]:
    yield "---"
    yield f"license: {manifest.model.license.lower()}"
    yield "pipeline_tag: text-generation"
    yield f"tags: [{manifest.target}, {manifest.model.family}, {_weights(manifest)}, mobile-export]"
    yield "---"


def _what(manifest: Manifest) -> Iterator[str]:
    model, tool = manifest.model, manifest.tools.get("mobile-export", "")
    yield f"# {model.name} for {manifest.runtime.name}"
    yield ""
    yield f"{model.name} ({model.family}) with {_weights(manifest)} weights, written by mobile-export {tool}"
    yield f"with the recipe `{manifest.recipe.name}`. Its weights are licensed under {model.license};"
    yield "see `NOTICE`. `manifest.json` says the same for programs, and what each file is."


def _needs(manifest: Manifest) -> Iterator[str]:
    runtime = manifest.runtime
    yield "## What it needs"
    yield ""
    yield f"- {runtime.name} {runtime.minimum_version} or later"
    if runtime.backends or runtime.kernels:
        yield f"- in it: {', '.join([*runtime.backends, *runtime.kernels])}"
    if runtime.cpu_features:
        yield f"- of the CPU: {', '.join(runtime.cpu_features)}"
    for note in runtime.notes:
        if note != _claim(manifest):
            yield ""
            yield note


def _calls(manifest: Manifest) -> Iterator[str]:
    io = manifest.io
    yield "## How it is called"
    yield ""
    yield f"- prompt and answer together: {io.context} tokens at most; KV cache {io.kv_cache}"
    yield f"- an answer ends with one of the tokens {', '.join(map(str, io.eos_ids))}"
    if io.bos_id is not None:
        yield f"- a text begins with the token {io.bos_id}"
    if io.normalize != "none":
        yield f"- text is put into {io.normalize} before it is tokenized with `tokenizer_runner.json`"
    yield ""
    rows = [row for method in io.methods for row in _tensors(method)]
    yield from _table(("method", "", "tensor", "type", "shape"), rows)


def _tensors(method: Method) -> Iterator[Sequence[str]]:
    """A row each; of tensors that only their number tells apart, the first and the last."""
    for word, tensors in (("in", method.inputs), ("state", method.states), ("out", method.outputs)):
        for group in _alike(tensors):
            names = [f"`{one.name}`" for one in group]
            name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)}"
            shape = ", ".join(str(size) for size in group[0].shape)
            yield method.name, word, name, group[0].dtype, f"[{shape}]"


def _alike(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Runs of one type and shape with a number in their names."""
    groups: list[list[TensorInfo]] = []
    for one in tensors:
        before = groups[-1][-1] if groups else None
        numbered = any(letter.isdigit() for letter in one.name)
        if before and numbered and (before.dtype, before.shape) == (one.dtype, one.shape):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _quality(manifest: Manifest) -> Iterator[str]:
    yield "## How near it is to its source"
    yield ""
    yield "Measured at export against the fp32 model. KL divergence in nats a position; top-1 is the share"
    yield "of positions with the same most likely token."
    if claim := _claim(manifest):
        yield f"**{claim}**"
    yield ""
    rows = [
        [stage, *(_show(figures.get(name)) for name in _FIGURES)]
        for stage, figures in sorted(manifest.quality.items())
    ]
    yield from _table(("", *_FIGURES.values()), rows)


def _provenance(manifest: Manifest) -> Iterator[str]:
    model = manifest.model
    yield "## Where it comes from"
    yield ""
    yield f"- source: `{model.spec}`, sha256 over config, tokenizer and weights `{model.digest}`"
    for name, value in sorted(model.provenance.items()):
        if isinstance(value, str) and "\n" not in value and name != "notice":
            yield f"- {name}: {value}"
    yield f"- recipe: `{manifest.recipe.name}`, digest `{manifest.recipe.digest}`"
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))
    yield f"- made with {tools}"


def _claim(manifest: Manifest) -> str:
    """What the figures do not show, where the artefact did not run in its own runtime."""
    from mobile_export.targets import target

    return str(getattr(target(manifest.target), "CLAIM", ""))


def _weights(manifest: Manifest) -> str:
    """`int8`, `int4` or `fp32`, from the recipe."""
    return str(manifest.recipe.table.get("quantize", {}).get("weights", "int8"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _show(value: Scalar | None) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
