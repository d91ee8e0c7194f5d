"""A bundle whose program no runtime opens: enough for what only carries bundles around."""

import json
import random
from pathlib import Path

import msgspec

from mobile_export import bundle, manifest
from mobile_export.bundle import Bundle
from mobile_export.recipe import load_recipe

CASES = [
    {"name": "one", "text": "one", "tokens": [5, 6], "greedy": list(range(20, 52)), "greedy_match": 30},
    {"name": "two", "text": "two", "tokens": [7], "greedy": list(range(60, 92)), "greedy_match": 32},
]


def write(folder: Path, target: str = "executorch", seed: int = 0) -> Bundle:
    """An Android bundle, or with `target="coreml"` one whose program is a package of several files."""
    recipe = load_recipe()
    tensor = manifest.TensorInfo(name="tokens", dtype="int64", shape=[1, "length"])
    made = manifest.Manifest(
        platform="ios" if target == "coreml" else "android",
        target=target,
        model=manifest.Model(
            name="fake", spec="sandbox:qwen2", family="qwen2", license="CC0-1.0", digest="0" * 64
        ),
        recipe=manifest.RecipeUsed(name=recipe.name, digest=recipe.digest, table=msgspec.to_builtins(recipe)),
        tools={},
        runtime=manifest.Runtime(name=target, minimum_version="1"),
        io=manifest.Contract(
            methods=[manifest.Method(name="forward", inputs=[tensor], outputs=[tensor])],
            constant_methods={},
            context=2048,
            vocab=512,
            kv_cache="fp32",
            eos_ids=[2],
            bos_id=None,
            normalize="NFC",
        ),
    )
    data = random.Random(seed).randbytes(300_000)
    names = ["model.pte"]
    if target == "coreml":
        names = ["model.mlpackage/Manifest.json", "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"]
    with bundle.create(folder) as draft:
        for name in names:
            draft.path(name, "program").write_bytes(data + name.encode())
        draft.path("it's a token.json", "tokenizer").write_bytes(b"{}")
        draft.path("selftest.json", "selftest").write_text(json.dumps({"schema": 1, "cases": CASES}))
        draft.finish(made)
    return bundle.load(folder)
