"""One runtime in a process of its own: answers JSON lines on stdin with JSON lines on stdout.

Runs in any environment that has the runtime and numpy: nothing of this package is imported before
a bundle is opened. Times are nanoseconds of the monotonic clock. See `workers.py` for the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class BundleRunner:
    """A bundle's artefact in its own runtime."""

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        from mobile_export.bundle import load
        from mobile_export.targets import target

        bundle = load(Path(spec["path"]))
        self.runner = target(bundle.manifest.target).open(bundle.path("program"), threads=threads)
        self.vocab, self.context = self.runner.vocab, self.runner.context
        self.last_logits, self.logits, self.reset = (
            self.runner.last_logits,
            self.runner.logits,
            self.runner.reset,
        )

    def close(self) -> None:
        """The process' end frees it."""


class LlamaRunner:
    """A GGUF in llama.cpp, through its C functions: a token's only Python is one `llama_decode` call.

    The model is mapped; both thread counts are `threads`; batches of 512; fp16 KV cache (its default).
    Logits are computed where they are read: at the last position, or with `all_logits` at each.
    """

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        import ctypes

        import llama_cpp as api  # type: ignore[import-not-found]
        import numpy as np

        self.api, self.np, self.ctypes = api, np, ctypes
        self._log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.load_mode = api.LLAMA_LOAD_MODE_MMAP
        model.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(spec["path"].encode(), model)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the GGUF")
        options = api.llama_context_default_params()
        options.n_ctx = spec["context"]
        options.n_batch = options.n_ubatch = self.batch = 512
        options.n_outputs_max = 0 if spec.get("all_logits") else 1
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(spec["flash_attention"])
        options.no_perf = True
        self.session = api.llama_init_from_model(self.model, options)
        if not self.session:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = api.llama_get_memory(self.session)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.context = api.llama_n_ctx(self.session)

    def last_logits(self, tokens: list[int], start: int) -> Any:
        """fp32 [vocab], valid until the next call."""
        self.api.llama_memory_seq_rm(self.memory, 0, start, -1)
        for at in range(0, len(tokens), self.batch):
            part = tokens[at : at + self.batch]
            array = (self.api.llama_token * len(part))(*part)
            self._decode(self.api.llama_batch_get_one(array, len(part)))
        return self._row(-1)

    def logits(self, tokens: list[int], start: int) -> Any:
        """fp32 [S, vocab]."""
        self.api.llama_memory_seq_rm(self.memory, 0, start, -1)
        rows = []
        batch = self.api.llama_batch_init(self.batch, 0, 1)
        for at in range(0, len(tokens), self.batch):
            part = tokens[at : at + self.batch]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, start + at + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            self._decode(batch)
            rows += [self._row(i).copy() for i in range(len(part))]
        self.api.llama_batch_free(batch)
        return self.np.stack(rows)

    def reset(self) -> None:
        """Forget the cache."""
        self.api.llama_memory_clear(self.memory, False)

    def close(self) -> None:
        """Free context and model."""
        self.api.llama_free(self.session)
        self.api.llama_model_free(self.model)

    def _decode(self, batch: Any) -> None:
        if code := self.api.llama_decode(self.session, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _row(self, index: int) -> Any:
        row = self.api.llama_get_logits_ith(self.session, index)
        return self.np.ctypeslib.as_array(row, shape=(self.vocab,))


RUNNERS: dict[str, Any] = {"bundle": BundleRunner, "llama.cpp": LlamaRunner}


class Worker:
    """The requests, one method each; each returns what the answer holds."""

    def __init__(self) -> None:
        self.runner: Any = None

    def open(self, spec: dict[str, Any], threads: int, again: bool) -> dict[str, Any]:
        """Open and make the first answer. `again`: a second time, so that imports are not in the time."""
        kind, floor = RUNNERS[spec["kind"]], 0
        if again:
            kind(spec, threads).close()
            floor = resident_bytes()
        begin = time.perf_counter_ns()
        self.runner = kind(spec, threads)
        self.runner.last_logits([7], 0)
        took = time.perf_counter_ns() - begin
        return {
            "ns": took,
            "vocab": self.runner.vocab,
            "context": self.runner.context,
            "floor_bytes": floor,
        }

    def turn(self, prompt: list[int], decode: int) -> dict[str, Any]:
        """A prompt in one call from an empty cache, then `decode` tokens, greedy, none of them the end."""
        cpu, clock, runner = time.process_time_ns(), time.perf_counter_ns, self.runner
        runner.reset()
        steps, tokens = [], []
        begin = clock()
        token = int(runner.last_logits(prompt, 0).argmax())
        prefill = clock() - begin
        for at in range(len(prompt), len(prompt) + decode):
            begin = clock()
            tokens.append(token)
            token = int(runner.last_logits([token], at).argmax())
            steps.append(clock() - begin)
        tokens.append(token)
        spent = time.process_time_ns() - cpu
        return {"prefill_ns": prefill, "decode_ns": steps, "tokens": tokens, "cpu_ns": spent}

    def logits(self, tokens: list[int], start: int, file: str) -> dict[str, Any]:
        """Every position's logits, fp32 [S, vocab], into a file."""
        self.runner.logits(tokens, start).astype("float32").tofile(file)
        return {}

    def reset(self) -> dict[str, Any]:
        """Forget the cache."""
        self.runner.reset()
        return {}

    def memory(self) -> dict[str, Any]:
        """The largest resident memory of this process so far."""
        return {"peak_bytes": resident_bytes("VmHWM")}


def resident_bytes(line: str = "VmRSS") -> int:
    """Resident memory now, or its peak since this program started (`VmHWM`).

    Linux's ru_maxrss would remember the larger process it was forked from; elsewhere it is all there is.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{line}:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Answer until stdin closes. What native code prints goes to stderr, not between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    cpu, idle_since = time.process_time_ns(), time.perf_counter_ns()
    for line in sys.stdin:
        idle = {
            "idle_ns": time.perf_counter_ns() - idle_since,
            "idle_cpu_ns": time.process_time_ns() - cpu,
        }
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request) | idle
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        cpu, idle_since = time.process_time_ns(), time.perf_counter_ns()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
