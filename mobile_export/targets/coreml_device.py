"""A package in Core ML itself, through coremltools on a Mac. Untested: no Mac has run this yet."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export import quiet
from mobile_export.errors import ExportError
from mobile_export.mlpackage import open_package, tensor_type
from mobile_export.targets.coreml import FLEXIBLE
from mobile_export.targets.coreml_graph import LOGITS, STATES

if TYPE_CHECKING:
    import numpy as np


class DeviceRunner:
    """Token by token through `decode`: coremltools loads one function a model, and a state is its model's."""

    def __init__(self, artifact: Path) -> None:
        if platform.system() != "Darwin":
            raise ExportError(
                "Core ML runs on a Mac only", "leave --runtime away: the evaluator runs the package here"
            )
        package = open_package(artifact)
        self.flexible = FLEXIBLE in package.functions
        name = None if self.flexible else "decode"
        with quiet.native():
            import coremltools
        self.model: Any = coremltools.models.MLModel(str(artifact), function_name=name)
        function = package.functions[name or FLEXIBLE]
        kinds = {one.name: tensor_type(one.type) for one in function.inputs}
        self.context = int(kinds[STATES[0]].shape[2] or 0)
        block = package.block(name or FLEXIBLE)
        logits = next(out for op in block.operations for out in op.outputs if out.name == LOGITS)
        self.vocab = int(tensor_type(logits.type).shape[-1] or 0)
        self.reset()

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab]."""
        import numpy as np

        return np.stack([self._next(token, start + index) for index, token in enumerate(tokens)])

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab]."""
        return self.logits(tokens, start)[-1]

    def reset(self) -> None:
        """A new, empty state."""
        self.state = self.model.make_state()

    def _next(self, token: int, at: int) -> np.ndarray:
        import numpy as np

        given = {"tokens": np.array([[token]], np.int32), "start": np.array([at], np.int32)}
        if self.flexible:
            given["last"] = np.zeros(1, np.int32)
        return self.model.predict(given, self.state)[LOGITS][0, 0].astype(np.float32)


def open(artifact: Path) -> DeviceRunner:  # noqa: A001
    """ExportError anywhere but on a Mac."""
    return DeviceRunner(artifact)
