"""A `Program` on disk: graph.json, program.json and weights.safetensors; no pickle.

`torch.export.save` writes weights twice in memory and pickles the sample inputs. The graph alone is
plain JSON, so we keep that, store each distinct tensor once, and rebuild the sample inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mobile_export.errors import ExportError
from mobile_export.files import sha256_file
from mobile_export.tensors import map_tensors, write_tensors
from mobile_export.types import Dims, Program, sample_inputs

if TYPE_CHECKING:
    from torch import Tensor

GRAPH, WEIGHTS, INDEX = "graph.json", "weights.safetensors", "program.json"


class _Slot(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the tensor of one name is."""

    key: str
    """Its name in the file; tied names carry one key."""
    shared: bool = False
    """In the checkpoint's own safetensors rather than in ours."""
    parameter: bool = False
    trains: bool = False


class _Index(msgspec.Struct, frozen=True):
    dims: Dims
    passes: tuple[str, ...]
    state: dict[str, _Slot]
    constants: dict[str, _Slot]
    sha256: dict[str, str]
    seal: str = ""
    """sha256 of this index with an empty seal."""

    def sealed(self) -> _Index:
        blank = msgspec.structs.replace(self, seal="")
        return msgspec.structs.replace(self, seal=hashlib.sha256(msgspec.json.encode(blank)).hexdigest())


def save(program: Program, folder: Path, shared: Mapping[str, Tensor] | None = None) -> None:
    """Write `program` into an existing folder. Tensors that equal one of `shared` are not stored.

    Same program, same bytes: no paths, no times. Raises OSError when the disk refuses.
    """
    from torch._export.serde.serialize import serialize

    exported = program.exported
    serialized = serialize(
        exported, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    )
    (folder / GRAPH).write_bytes(_portable(serialized.exported_program))
    shelf = _Shelf(shared or {})
    state = {name: shelf.slot(name, tensor) for name, tensor in exported.state_dict.items()}
    constants = {name: shelf.slot(name, tensor) for name, tensor in exported.constants.items()}
    write_tensors(folder / WEIGHTS, shelf.own)
    sums = {name: sha256_file(folder / name) for name in (GRAPH, WEIGHTS)}
    index = _Index(program.dims, program.passes, state, constants, sums).sealed()
    (folder / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n")


def load(folder: Path, shared: Mapping[str, Tensor] | None = None) -> Program:
    """Read what `save` wrote, weights mapped from disk; `shared` as given to `save`.

    ExportError when a file is missing or altered, or `shared` lacks a tensor.
    """
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    from mobile_export import dialect

    assert dialect.attention is not None  # importing it registered the operators
    index = _read_index(folder)
    weights = {False: map_tensors(folder / WEIGHTS), True: dict(shared or {})}
    known: dict[_Slot, Tensor] = {}
    state, constants = (
        {name: _take(slot, weights, known) for name, slot in slots.items()}
        for slots in (index.state, index.constants)
    )
    inputs, _ = sample_inputs(index.dims)
    # Given as objects, these three are taken as they are; given as bytes they would be unpickled.
    parts: tuple[Any, Any, Any] = (state, constants, (inputs, {}))
    exported = deserialize(SerializedArtifact((folder / GRAPH).read_bytes(), *parts))
    return Program(exported, index.dims, index.passes)


class _Shelf:
    """Gives each distinct tensor one key, in the checkpoint's weights if it is there already."""

    def __init__(self, shared: Mapping[str, Tensor]) -> None:
        self.shared = shared
        self.own: dict[str, Tensor] = {}
        self.known: dict[tuple[Any, ...], _Slot] = {}

    def slot(self, name: str, tensor: Tensor) -> _Slot:
        import torch

        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            raise TypeError(f"'{name}' is not a contiguous tensor")
        parameter = isinstance(tensor, torch.nn.Parameter)
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, parameter, tensor.requires_grad)
        if identity not in self.known or not tensor.numel():
            twin = self._twin(name, tensor)
            if twin is None:
                self.own[name] = tensor
            self.known[identity] = _Slot(twin or name, twin is not None, parameter, tensor.requires_grad)
        return self.known[identity]

    def _twin(self, name: str, tensor: Tensor) -> str | None:
        """The checkpoint's name for these very values; its best guess by name is the one compared."""
        import torch

        end = name.split(".", 1)[-1]
        for key, other in self.shared.items():
            alike = key.endswith(end) and other.dtype == tensor.dtype and other.shape == tensor.shape
            if alike and torch.equal(other, tensor):
                return key
        return None


def _take(slot: _Slot, weights: dict[bool, dict[str, Tensor]], known: dict[_Slot, Tensor]) -> Tensor:
    import torch

    if slot not in known:
        tensor = weights[slot.shared].get(slot.key)
        if tensor is None:
            raise ExportError(f"the cached program lacks '{slot.key}'", "export again with a fresh cache")
        known[slot] = torch.nn.Parameter(tensor, requires_grad=slot.trains) if slot.parameter else tensor
    return known[slot]


def _read_index(folder: Path) -> _Index:
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index)
        whole = index == index.sealed() and all(
            sha256_file(folder / name) == index.sha256[name] for name in (GRAPH, WEIGHTS)
        )
    except (OSError, KeyError, msgspec.DecodeError):
        whole = False
    if not whole:
        raise ExportError("a cached program is damaged", "export again with a fresh cache")
    return index


def _portable(graph: bytes) -> bytes:
    """Without what differs from run to run: stack traces hold paths, `from_node` memory addresses."""
    parsed = json.loads(graph)
    for node in parsed["graph_module"]["graph"]["nodes"]:
        for name in ("stack_trace", "from_node"):
            node["metadata"].pop(name, None)
    return json.dumps(parsed, separators=(",", ":")).encode()
