"""A report in other people's words: llama-bench's JSON, and PyTorch's benchmark records (v3).

Field names: llama.cpp's tools/llama-bench/README.md; pytorch/test-infra's
clickhouse_db_schema/oss_ci_benchmark_v3/schema.sql. What is no speed is not exported.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from mobile_export.errors import ExportError
from mobile_export.files import write_file
from mobile_export.latency.protocol import Contender
from mobile_export.latency.reports import Report


def save(records: list[dict[str, Any]], path: Path) -> None:
    """Write records as a JSON array."""
    write_file(path, msgspec.json.format(msgspec.json.encode(records), indent=1) + b"\n")


def llama_bench(report: Report) -> list[dict[str, Any]]:
    """One record for each prompt (`n_prompt`) and each run of decoded tokens (`n_gen` at `n_depth`)."""
    return [
        {
            "cpu_info": report.machine.cpu,
            "backends": contender.runtime,
            "model_filename": contender.name,
            "model_size": contender.file_bytes,
            "n_threads": threads,
            "type_k": contender.options.get("kv cache", "").replace("fp", "f"),
            "type_v": contender.options.get("kv cache", "").replace("fp", "f"),
            "n_prompt": prompt,
            "n_gen": decoded,
            "n_depth": depth,
            "test_time": _utc(report).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **_llama_figures(prompt + decoded, samples),
        }
        for contender, threads, prompt, decoded, depth, samples in _series(report)
    ]


def pytorch_v3(report: Report) -> list[dict[str, Any]]:
    """One record for each metric: tokens a second, load, time to the first token, peak memory."""
    records = []
    for contender in _timed(report):
        for name, values, more in _metrics(report, contender):
            metric = {"name": name, "benchmark_values": values, "extra_info": more}
            records.append({**_about(report, contender), "metric": metric})
    return records


def _timed(report: Report) -> list[Contender]:
    timed = [one for one in report.contenders if not report.not_speed(one)]
    if not timed:
        raise ExportError(
            f"nothing in this report is a speed: {report.not_speed(report.contenders[0])}",
            "measure on real hardware",
        )
    return timed


def _series(report: Report) -> Iterator[tuple[Contender, int, int, int, int, list[int]]]:
    """Contender, threads, tokens of the prompt, tokens decoded, depth, nanoseconds by round."""
    for contender in _timed(report):
        for threads in report.protocol.threads:
            for regime in report.protocol.regimes:
                turns = report.of(contender.name, threads, regime.prompt)
                if regime.prompt:
                    yield contender, threads, regime.prompt, 0, 0, [one.prefill_ns for one in turns]
                if regime.decode:
                    times = [sum(one.decode_ns) for one in turns]
                    yield contender, threads, 0, regime.decode, regime.prompt, times


def _llama_figures(tokens: int, samples: list[int]) -> dict[str, Any]:
    """Mean and sample standard deviation, as llama-bench has them."""
    speeds = [tokens / ns * 1e9 for ns in samples]
    deviation = statistics.stdev if len(samples) > 1 else lambda values: 0.0
    return {
        "avg_ns": round(statistics.mean(samples)),
        "stddev_ns": round(deviation(samples)),
        "avg_ts": statistics.mean(speeds),
        "stddev_ts": deviation(speeds),
        "samples_ns": samples,
        "samples_ts": speeds,
    }


def _about(report: Report, contender: Contender) -> dict[str, Any]:
    machine = report.machine
    return {
        "timestamp": int(_utc(report).timestamp()),
        "schema_version": "v3",
        "name": "mobile-export bench",
        "benchmark": {
            "name": "mobile-export bench",
            "mode": "inference",
            "dtype": contender.options.get("recipe", contender.options.get("weights", "")),
            "extra_info": {"device": report.device.name, "rounds": str(report.protocol.rounds)},
        },
        "model": {
            "name": contender.model[:16],
            "type": "language model",
            "backend": contender.runtime,
            "origins": [],
            "extra_info": {"artefact": contender.name, **contender.options},
        },
        "runners": [
            {
                "name": report.device.name,
                "type": machine.system,
                "cpu_info": machine.cpu,
                "cpu_count": machine.cores,
                "avail_mem_in_gb": machine.memory_bytes // 2**30,
            }
        ],
        "dependencies": {name: {"version": version} for name, version in machine.versions.items()},
    }


def _metrics(report: Report, contender: Contender) -> Iterator[tuple[str, list[float], dict[str, str]]]:
    """Name, a value a round, and what it is of."""
    for one, threads, prompt, decoded, depth, samples in _series(report):
        if one.name == contender.name:
            name = f"prefill_{prompt}_tokens_per_sec" if prompt else f"decode_{decoded}_tokens_per_sec"
            more = {"threads": str(threads), "depth": str(depth)}
            yield name, [(prompt + decoded) / ns * 1e9 for ns in samples], more
    for threads in report.protocol.threads:
        more, key = {"threads": str(threads)}, (contender.name, threads)
        for kind in ("cold", "warm"):
            loads = [
                one.ns / 1e6 for one in report.loads if (one.contender, one.threads, one.kind) == (*key, kind)
            ]
            if loads:
                yield f"{kind}_load_ms", loads, more
        firsts = [one for one in report.first_tokens if (one.contender, one.threads) == key]
        if firsts:
            yield "time_to_first_token_ms", [one.prefill_ns / 1e6 for one in firsts], more
            whole = [(one.tokenize_ns + one.prefill_ns) / 1e6 for one in firsts]
            yield "time_to_first_token_of_text_ms", whole, more
        peaks = [one.peak_bytes / 1e6 for one in report.memory if (one.contender, one.threads) == key]
        if peaks:
            yield "peak_memory_mb", peaks, more


def _utc(report: Report) -> datetime:
    return datetime.fromisoformat(report.started)
