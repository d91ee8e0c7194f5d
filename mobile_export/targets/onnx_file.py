"""An ONNX model under construction: nodes in order, large weights streamed to a file beside it.

The data file is laid out so that the runtime maps it: every tensor starts on a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

OPSET, IR = 23, 11
MICROSOFT = "com.microsoft"
PAGE = 4096
INLINE = 1024
"""Bytes up to which a tensor stays in the `.onnx` itself."""


def data_file(model: Path) -> Path:
    """The file of a model's large weights."""
    return model.with_name(model.name + ".data")


class ModelFile:
    """Collects nodes and weights; `save` writes the `.onnx`. Use it as a context manager.

    The same calls give the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = data_file(path).open("wb")
        self.nodes: list[NodeProto] = []
        self.made: set[str] = set()
        """Names of all values that nodes give."""
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self._weights: dict[str, TensorProto] = {}

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.data.close()

    def call(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, which bears its name."""
        self.calls(op, inputs, [name], **attributes)
        return name

    def calls(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node; `op` is `Name` or `domain:Name`, and '' an optional input or output left out."""
        from onnx import helper

        domain, _, kind = op.rpartition(":")
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain or None, **attributes)
        )
        self.made.update(outputs)

    def constant(self, name: str, value: Any, dtype: str) -> str:
        """A small weight from a number or a list."""
        import numpy as np

        return self.weight(name, lambda: np.array(value, dtype))

    def weight(self, name: str, make: Callable[[], np.ndarray], *, inline: int = INLINE) -> str:
        """The initializer `name`; `make()` gives its array where there is none yet.

        One of more than `inline` bytes goes to the data file.
        """
        if name not in self._weights:
            self._weights[name] = self._store(name, make(), inline)
        return name

    def view(self, name: str, of: str, first: int, shape: Sequence[int]) -> str:
        """An initializer over the same bytes of the data file as `of`, from its row `first` on.

        The runtime maps each initializer by itself, and lets go of each by itself.
        """
        from onnx import TensorProto
        from onnx.external_data_helper import ExternalDataInfo

        whole = self._weights[of]
        row = (ExternalDataInfo(whole).length or 0) // whole.dims[0]
        part = TensorProto(name=name, data_type=whole.data_type, dims=shape)
        _refer(part, data_file(self.path), self.offset(of) + first * row, shape[0] * row)
        self._weights.setdefault(name, part)
        return name

    def offset(self, name: str) -> int:
        """Where an initializer starts in the data file."""
        from onnx.external_data_helper import ExternalDataInfo

        return ExternalDataInfo(self._weights[name]).offset or 0

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """An input of the model. One that is a weight's name too may be left out by the caller."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """An output of the model."""
        from onnx import helper

        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def save(self, metadata: dict[str, Any]) -> None:
        """Write the `.onnx`; metadata values that are no text are stored as JSON."""
        texts = {
            name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for name, value in sorted(metadata.items())
        }
        self.path.write_bytes(self._model(texts).SerializeToString(deterministic=True))

    def _model(self, metadata: dict[str, str]) -> ModelProto:
        from onnx import helper

        read = {name for node in self.nodes for name in node.input}
        weights = [tensor for name, tensor in self._weights.items() if name in read]
        model = helper.make_model(
            helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, weights),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR,
            producer_name="mobile-export",
        )
        helper.set_model_props(model, metadata)
        return model

    def _store(self, name: str, array: np.ndarray, inline: int) -> TensorProto:
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        if array.nbytes <= inline:
            return numpy_helper.from_array(array, name)
        at = -(-self.data.tell() // PAGE) * PAGE
        self.data.write(b"\0" * (at - self.data.tell()))
        np.ascontiguousarray(array).tofile(self.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
        _refer(tensor, data_file(self.path), at, array.nbytes)
        return tensor


def _refer(tensor: TensorProto, file: Path, offset: int, length: int) -> None:
    """Say where in the data file a tensor's bytes are."""
    from onnx.external_data_helper import set_external_data

    tensor.raw_data = b""
    set_external_data(tensor, file.name, offset, length)
    tensor.ClearField("raw_data")
