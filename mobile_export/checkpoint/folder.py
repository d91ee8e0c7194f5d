"""A transformers folder: checked before anything heavy reads it, and digested."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mobile_export.checkpoint.families import write_json
from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.types import Checkpoint

FAMILIES = ("llama", "qwen2", "qwen3")
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_INDEX = "model.safetensors.index.json"
_MEMO = ".digests.json"


def resolve(path: Path) -> Checkpoint:
    """The checkpoint in a folder of the user's."""
    family = validate(path)
    name = safe_name(path.resolve().name)
    return Checkpoint(
        name=name,
        spec=path.resolve().name,
        folder=path,
        family=family,
        digest=digest(path),
        license=license_of(path),
        provenance={"kind": "folder"},
    )


def safe_name(text: str) -> str:
    """Lower case, with nothing a folder name cannot hold."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"


def validate(path: Path) -> str:
    """The folder's family, or ExportError when it is not a whole, safe, supported checkpoint."""
    config = read_json(path, "config.json")
    _refuse_code(config, "config.json")
    if (path / "tokenizer_config.json").exists():
        _refuse_code(read_json(path, "tokenizer_config.json"), "tokenizer_config.json")
    family = str(config.get("model_type", ""))
    check_family(family)
    if "quantization_config" in config:
        raise ExportError("this checkpoint is already quantized", "use the original weights, or a GGUF file")
    for file in weight_files(path):
        check_safetensors(file)
    if not (path / "tokenizer.json").is_file():
        raise ExportError(
            "tokenizer.json is missing", "save the tokenizer with transformers (fast tokenizer)"
        )
    read_json(path, "tokenizer.json")
    for name in TEXT_FILES:
        _refuse_escape(path, name)
    return family


def check_family(family: str) -> None:
    """Raise ExportError unless we can export this architecture."""
    if family not in FAMILIES:
        hint = f"use a model of one of these families: {', '.join(FAMILIES)}"
        raise ExportError(f"unsupported architecture '{family}'", hint)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`."""
    _refuse_escape(folder, name)
    try:
        value = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{name} is missing", "point --model at a transformers folder") from None
    except (OSError, ValueError, RecursionError):
        raise ExportError(f"{name} cannot be read", "it is damaged: copy or download it again") from None
    if not isinstance(value, dict):
        raise ExportError(f"{name} is not a JSON object", "it is damaged: copy or download it again")
    return value


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, one or a set of shards, in name order."""
    if (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (path / _INDEX).is_file():
        index = read_json(path, _INDEX)
        shards = index.get("weight_map")
        texts = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
        if not shards or not texts or not isinstance(index.get("metadata"), dict):
            raise ExportError(f"{_INDEX} has no weight map", "it is damaged: copy or download it again")
        names = sorted(set(shards.values()))
    elif any(path.glob("pytorch_model*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ExportError("the weights are a pickle, which can run code", "save them as safetensors first")
    else:
        raise ExportError("model.safetensors is missing", "point --model at a transformers folder")
    for name in names:
        if Path(name).name != name:
            raise ExportError(f"'{name}' leads out of its folder", "do not use this model: it was altered")
        _refuse_escape(path, name)
        if not (path / name).is_file():
            raise ExportError(f"{name} is missing", "copy or download the whole model")
    return [path / name for name in names]


def check_safetensors(file: Path) -> None:
    """Raise ExportError unless the header is sound and the data ends where the file ends."""
    size = file.stat().st_size
    damaged = ExportError(f"{file.name} is damaged or cut short", "copy or download it again")
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= size - 8:
            raise damaged
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            whole = 8 + length + max(ends, default=0) == size
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise damaged from None
    if not whole:
        raise damaged


def digest(path: Path) -> str:
    """sha256 over the sorted names and sha256 of config, tokenizer, chat template and weights."""
    known = _read_memo(path)["weights"]
    total = hashlib.sha256()
    files = [path / name for name in TEXT_FILES if (path / name).is_file()] + weight_files(path)
    for file in sorted(files, key=lambda file: file.name):
        total.update(f"{file.name} {known.get(_stamp(file)) or sha256_file(file)}\n".encode())
    return total.hexdigest()


def seal(path: Path) -> None:
    """Finish a folder of our cache: note its digest and each weight file's sha256 in it.

    Gigabytes need not be read again while a file's size and modification time stay the same.
    """
    weights = {_stamp(file): sha256_file(file) for file in weight_files(path)}
    write_json(path / _MEMO, {"digest": digest(path), "weights": weights})


def intact(path: Path) -> bool:
    """Whether a folder of our cache is still what it was when it was sealed."""
    try:
        return bool(digest(path) == _read_memo(path)["digest"])
    except (ExportError, OSError):
        return False


def _read_memo(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"digest": None, "weights": {}}
    try:
        memo = json.loads((path / _MEMO).read_text("utf-8"))
    except (OSError, ValueError):
        return empty
    return memo if isinstance(memo, dict) and memo.keys() == empty.keys() else empty


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file.name} {stat.st_size} {stat.st_mtime_ns}"


def license_of(path: Path) -> str:
    """The SPDX id in the model card's front matter, or `unknown`."""
    card = path / "README.md"
    if not card.is_file() or _escapes(path, card.name):
        return "unknown"
    found = re.match(r"---\n(?:.*\n)*?license:\s*([\w.+-]+)\s*\n", card.read_text("utf-8", "replace"))
    return _SPDX.get(found[1].lower(), found[1]) if found else "unknown"


_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT"}


def _refuse_code(config: dict[str, Any], name: str) -> None:
    if "auto_map" in config:
        raise ExportError(f"{name} asks to run the model's own code (auto_map)", "use a model without it")


def _refuse_escape(folder: Path, name: str) -> None:
    if _escapes(folder, name):
        raise ExportError(f"'{name}' leads out of its folder", "do not use this model: it was altered")


def _escapes(folder: Path, name: str) -> bool:
    """A link may lead to the folder itself, or to the blobs of the hub's cache that it belongs to."""
    root = folder.resolve()
    target = (folder / name).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return not (target.is_relative_to(root) or target.is_relative_to(blobs))
