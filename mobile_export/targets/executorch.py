"""ExecuTorch: the program lowered to a `.pte` for XNNPACK and the stock LLM runner of Android and iOS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_export import quiet
from mobile_export.files import write_file
from mobile_export.manifest import Contract, Method, Runtime, TensorInfo
from mobile_export.pte_share import share_constants
from mobile_export.targets import Lowered, need_int8
from mobile_export.targets.executorch_every import CHUNK, every_position
from mobile_export.targets.executorch_graph import executorch_module
from mobile_export.targets.executorch_partition import partitioner
from mobile_export.types import Checkpoint, Dims, Program

if TYPE_CHECKING:
    import numpy as np
    from executorch.exir import EdgeCompileConfig
    from torch.export import ExportedProgram

    from mobile_export.bundle import Draft
    from mobile_export.recipe import ExecuTorch as Options
    from mobile_export.recipe import Recipe


def write(program: Program, recipe: Recipe, checkpoint: Checkpoint, draft: Draft) -> Lowered:
    """Lower into a bundle's `model.pte` and say what it needs and how it is called."""
    from mobile_export import pte
    from mobile_export.checkpoint.load import eos_ids

    need_int8(recipe, "ExecuTorch")
    artifact = draft.path("model.pte", "program")
    ends, begin = eos_ids(checkpoint), checkpoint.tokenizer().bos_token_id
    extra = {"get_eos_ids": ends} | ({} if begin is None else {"get_bos_id": begin})
    lower(program, recipe.executorch, extra, artifact)
    summary = pte.read(artifact)
    forward = next(method for method in summary.methods if method.name == "forward")
    runtime = Runtime(
        name="ExecuTorch",
        minimum_version=version("executorch"),
        kernels=["portable", "quantized", "llm custom ops"],
        backends=sorted(forward.delegates),
        outside_backend=forward.operators,
        notes=[
            "forward is what a device runs; forward_all has a KV cache of its own: do not mix them.",
            f"{sum(forward.delegates.values())} delegate calls a forward.",
        ],
    )
    io = Contract(
        methods=_methods(program.dims, recipe.executorch),
        constant_methods=summary.constants,
        context=program.dims.context,
        vocab=program.dims.vocab,
        kv_cache=recipe.executorch.kv_cache,
        eos_ids=ends,
        bos_id=begin,
        normalize="none",
    )
    return Lowered(artifact, runtime, io, ("executorch", "torchao"))


def lower(program: Program, options: Options, constants: dict[str, Any], out: Path) -> None:
    """Write the `.pte`.

    `constants` become constant methods (name -> int or list of int) beside those that the stock
    runner needs and the program itself knows.
    """
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    edge, config = _lower_forward(_export(program, options))
    methods = {"forward": edge}
    if options.all_logits:
        methods["forward_all"] = every_position(edge)
    manager = EdgeProgramManager(methods, {**_constants(program.dims), **constants}, config)
    planning = MemoryPlanningPass(alloc_graph_input=False)
    backend = ExecutorchBackendConfig(extract_delegate_segments=True, memory_planning_pass=planning)
    write_file(out, share_constants(manager.to_executorch(backend).buffer))


def _lower_forward(exported: ExportedProgram) -> tuple[ExportedProgram, EdgeCompileConfig]:
    """The edge program with its XNNPACK delegates.

    `to_edge_transform_and_lower` would decompose the whole graph once more for each partitioner.
    """
    import torch
    from executorch.exir import EdgeCompileConfig, to_edge

    linear = torch.ops.aten.linear.default
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=[linear])
    edge = to_edge(exported, compile_config=config).to_backend(partitioner())
    return edge.exported_program(), config


def _export(program: Program, options: Options) -> ExportedProgram:
    import torch

    _register_kernels()
    sample = min(8, program.dims.context)
    length = torch.export.Dim("length", min=1, max=program.dims.context) if sample > 1 else None
    inputs = (torch.zeros(1, sample, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        return torch.export.export(
            executorch_module(program, options),
            inputs,
            dynamic_shapes={"tokens": {1: length}, "start": None},
            strict=False,
        )


def _register_kernels() -> None:
    """Importing them registers quantized_decomposed's out variants and llama::*, here and in the runtime."""
    import executorch.kernels.quantized
    from executorch.extension.llm.custom_ops import custom_ops

    assert executorch.kernels.quantized and custom_ops


def _constants(dims: Dims) -> dict[str, Any]:
    """What the stock runner asks the program (get_max_seq_len and get_max_context_len must be equal)."""
    return {
        "get_max_seq_len": dims.context,
        "get_max_context_len": dims.context,
        "get_vocab_size": dims.vocab,
        "get_n_layers": dims.layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _methods(dims: Dims, options: Options) -> list[Method]:
    def method(name: str, length: str, answers: int | str) -> Method:
        return Method(
            name=name,
            inputs=[
                TensorInfo(name="tokens", dtype="int64", shape=[1, length]),
                TensorInfo(name="start", dtype="int64", shape=[1]),
            ],
            outputs=[TensorInfo(name="logits", dtype="fp32", shape=[1, answers, dims.vocab])],
        )

    most = f"length<={min(CHUNK, dims.context)}"
    every = [method("forward_all", most, most)] if options.all_logits else []
    return [method("forward", f"length<={dims.context}", 1), *every]


class PteRunner:
    """Runs a `.pte` in the real ExecuTorch runtime, one method at a time.

    `forward` and `forward_all` have a KV cache each, and the Python runtime lends both the same
    memory; a change of method mid-sequence loads the other one and feeds it what went before.
    """

    def __init__(self, artifact: Path, *, threads: int = 1) -> None:
        with quiet.native():
            _register_kernels()
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime

            _unsafe_reset_threadpool(threads)
            self.program = Runtime.get().load_program(artifact)
        self.active = ""
        self.method: Any = None
        self.fed: list[int] = []
        self.context = self._constant("get_max_context_len")
        self.vocab = self._constant("get_vocab_size")

    def last_logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [vocab], by the method that devices run."""
        return self._run("forward", tokens, start)[-1]

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """fp32 [S, vocab], by `forward_all`, as many positions a call as its output holds."""
        import numpy as np

        parts = range(0, len(tokens), CHUNK)
        return np.concatenate([self._run("forward_all", tokens[at : at + CHUNK], start + at) for at in parts])

    def reset(self) -> None:
        """Forget the sequence: attention reads only what was written since position 0."""
        self.fed = []

    def _run(self, name: str, tokens: Sequence[int], start: int) -> np.ndarray:
        if name != self.active:
            self.method, self.active = self._load(name), name
            if start:
                self._execute(self.fed[:start], 0)
        self.fed = [*self.fed[:start], *tokens]
        return self._execute(tokens, start)

    def _execute(self, tokens: Sequence[int], start: int) -> np.ndarray:
        import torch

        inputs = (torch.tensor([list(tokens)]), torch.tensor([start]))
        with _one_blas_thread():
            return self.method.execute(inputs)[0][0].numpy()

    def _load(self, name: str) -> Any:
        with quiet.native():
            return self.program.load_method(name)

    def _constant(self, name: str) -> int:
        return int(self._load(name).execute(())[0])


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """The wheel's attention kernel calls torch's BLAS, whose own threads would spin beside the runtime's.

    This reaches the calling thread only. For more than one runtime thread, a process sets
    OMP_NUM_THREADS=1 before it imports torch (`targets.SOLO_BLAS`).
    """
    import torch

    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def open(artifact: Path, *, threads: int = 1) -> PteRunner:  # noqa: A001
    """A runner over the `.pte` with that many threads in this process' pool."""
    return PteRunner(artifact, threads=threads)
