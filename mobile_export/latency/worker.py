"""One runtime in a process of its own, or a probe of its machine: JSON lines in, JSON lines out.

A peer's runs in an environment that has that runtime and numpy alone: nothing of this package is
imported before a bundle is opened or the machine asked for. Times are nanoseconds of the monotonic
clock. See `workers.py` for the other end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mobile_export.latency.pages import cached_share, drop, give_back, resident_bytes


class BundleRunner:
    """A bundle's artefact in its own runtime."""

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        from mobile_export.bundle import load
        from mobile_export.targets import target

        self.bundle = load(Path(spec["path"]))
        module = target(self.bundle.manifest.target)
        self.runner = module.open(self.bundle.path("program"), threads=threads)
        self.vocab, self.context = self.runner.vocab, self.runner.context
        self.last_logits, self.logits, self.reset = (
            self.runner.last_logits,
            self.runner.logits,
            self.runner.reset,
        )

    def tokenizer(self) -> Any:
        """The bundle's own tokenizer, normalization included."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.bundle.path("tokenizer")))

    def cases(self) -> Any:
        """The bundle's selftest: see `golden.selftest`."""
        return json.loads(self.bundle.path("selftest").read_bytes())["cases"]

    def close(self) -> None:
        """Free the artefact."""
        self.runner = self.last_logits = self.logits = self.reset = None
        gc.collect()


def runner(spec: dict[str, Any], threads: int) -> Any:
    """What runs that kind of artefact, on the cores `cpus` alone if the spec has any."""
    if cpus := spec.get("cpus"):
        if not hasattr(os, "sched_setaffinity"):
            raise RuntimeError("this system pins no process to cores")
        os.sched_setaffinity(0, cpus)
    if spec["kind"] == "bundle":
        return BundleRunner(spec, threads)
    from mobile_export.latency.llama import LlamaRunner

    return LlamaRunner(spec, threads)


FIRST = 7
"""What is decoded first where there is no prompt: the first id of every prompt."""


class Worker:
    """The requests, one method each; each returns what the answer holds."""

    def __init__(self) -> None:
        self.runner: Any = None
        self.tokenizer: Any = None

    def open(self, spec: dict[str, Any], threads: int) -> dict[str, Any]:
        """Open and make the first answer."""
        begin = time.perf_counter_ns()
        self.runner = runner(spec, threads)
        self.runner.last_logits([FIRST], 0)
        took = time.perf_counter_ns() - begin
        return {"ns": took, "vocab": self.runner.vocab, "context": self.runner.context}

    def load(self, spec: dict[str, Any], threads: int) -> dict[str, Any]:
        """Open three times: for the imports, with the files dropped from the page cache, with them in it."""
        self.open(spec, threads)
        loads = []
        for kind in ("cold", "warm"):
            self.runner.close()
            files = [Path(spec["path"]) / name for name in spec["files"]]
            if kind == "cold" and not drop(files):
                self.open(spec, threads)
                continue
            cached = cached_share(files)
            loads.append({"kind": kind, "ns": self.open(spec, threads)["ns"], "cached": cached})
        return {"loads": loads, "vocab": self.runner.vocab}

    def memory(self, spec: dict[str, Any], threads: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """Resident bytes with imports done, before the artefact is opened, and the most in the turns."""
        self.open(spec, threads)
        self.runner.close()
        give_back()
        floor = resident_bytes()
        self.open(spec, threads)
        for turn in turns:
            self.turn(**turn)
        return {"floor_bytes": floor, "peak_bytes": resident_bytes("VmHWM")}

    def turn(self, prompt: list[int], decode: int) -> dict[str, Any]:
        """A prompt in one call from an empty cache, then `decode` tokens, greedy, none of them the end."""
        cpu, clock, runner = time.process_time_ns(), time.perf_counter_ns, self.runner
        runner.reset()
        steps, tokens, token, prefill = [], [], FIRST, 0
        if prompt:
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

    def first_token(self, text: str) -> dict[str, Any]:
        """From a text to the first token of its answer; the tokenizer is loaded before."""
        self.tokenizer = self.tokenizer or self.runner.tokenizer()
        clock = time.perf_counter_ns
        begin = clock()
        tokens = self.tokenizer.encode(text).ids[: self.runner.context - 1]
        tokenized = clock() - begin
        turn = self.turn(tokens, 0)
        return {
            "tokens": len(tokens),
            "tokenize_ns": tokenized,
            "prefill_ns": turn["prefill_ns"],
            "said": turn["tokens"],
        }

    def long_run(self, prompt: list[int], decode: int, seconds: float) -> dict[str, Any]:
        """The same turn over and over, `seconds` long."""
        end, turns = time.perf_counter() + seconds, list[list[int]]()
        while not turns or time.perf_counter() < end:
            turns.append(self.turn(prompt, decode)["decode_ns"])
        return {"decode_ns": turns}

    def check(self, tokens: int) -> dict[str, Any]:
        """Of each case's first `tokens` greedy tokens, those that are the source's until one is not."""
        matched = expected = 0
        for case in self.runner.cases():
            self.runner.reset()
            given, at = case["tokens"], 0
            for wanted in case["greedy"][:tokens]:
                if int(self.runner.last_logits(given, at).argmax()) != wanted:
                    break
                matched, at, given = matched + 1, at + len(given), [wanted]
            expected += min(case["greedy_match"], tokens)
        return {"matched": matched, "expected": expected}

    def machine(self) -> dict[str, Any]:
        """What this machine is."""
        from mobile_export.latency import machine

        return {"machine": _plain(machine.describe())}

    def state(self, threads: int, number: int, when: Any) -> dict[str, Any]:
        """What this machine is doing."""
        from mobile_export.latency import machine

        return {"state": _plain(machine.state(threads, number, when))}

    def busy(self) -> dict[str, Any]:
        """Processor seconds of the whole machine, and the clock they were read at."""
        from mobile_export.latency import machine

        return {"busy_seconds": machine.busy_seconds(), "ns": time.perf_counter_ns()}

    def bandwidth(self, threads: int) -> dict[str, Any]:
        """How fast this machine reads memory."""
        from mobile_export.latency import machine

        return {"bandwidth": _plain(machine.bandwidth(threads))}

    def logits(self, tokens: list[int], start: int, file: str) -> dict[str, Any]:
        """Every position's logits, fp32 [S, vocab], into a file."""
        self.runner.logits(tokens, start).astype("float32").tofile(file)
        return {}

    def reset(self) -> dict[str, Any]:
        """Forget the cache."""
        self.runner.reset()
        return {}


def _plain(struct: Any) -> Any:
    """A struct as JSON has it."""
    import msgspec

    return msgspec.to_builtins(struct)


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
