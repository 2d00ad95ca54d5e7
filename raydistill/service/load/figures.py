"""Figures of a load run: rates, percentiles with intervals, goodput, stages, and the ratio of two kinds.

Latencies of neighbours in a queue are alike, so a phase's requests are resampled in blocks of sqrt(n) that
follow each other (circular block bootstrap); single ones would promise intervals that are too narrow. Pairs
of a comparison run alone, one after the other, and are resampled singly.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.service.load.kill import after_kills
from raydistill.service.load.plan import generator
from raydistill.service.load.rows import Record, Row, Run, accounting

LEVELS = (50.0, 95.0, 99.0)
WITH_INTERVAL = (50.0, 95.0)
STAGES = ("queue", "encode", "denoise", "decode", "rest")
Figures = dict[str, Any]


def resampled(
    values: np.ndarray, levels: Sequence[float], chance: np.random.Generator, draws: int
) -> np.ndarray:
    """Return percentiles (draws, levels) of `values`, in their order of arrival, resampled in blocks."""
    count = len(values)
    block = max(1, round(math.sqrt(count)))
    out = np.empty((draws, len(levels)))
    for draw in range(draws):  # one by one: all draws of many requests together would not fit into memory
        starts = chance.integers(count, size=-(-count // block))
        places = (starts[:, None] + np.arange(block)).ravel()[:count] % count
        out[draw] = np.percentile(values[places], levels)
    return out


def distribution(values: Sequence[float | None], config: BenchServeConfig, purpose: str) -> Figures | None:
    """Return count, mean, p50, p95, p99, max, and 95 % intervals of p50 and p95; None without any value."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return None
    found: Figures = {"count": len(known), "mean": float(known.mean()), "max": float(known.max())}
    found |= {
        f"p{level:g}": float(value) for level, value in zip(LEVELS, np.percentile(known, LEVELS), strict=True)
    }
    drawn = resampled(known, WITH_INTERVAL, generator(config.seed, f"bootstrap/{purpose}"), config.num_draws)
    for level, column in zip(WITH_INTERVAL, drawn.T, strict=True):
        low, high = np.percentile(column, [2.5, 97.5])
        found |= {f"p{level:g}_low": float(low), f"p{level:g}_high": float(high)}
    return found


def in_hand(row: Row) -> bool:
    """Whether the request led to a video that is here."""
    return row.latency_s is not None


def throughput(record: Record) -> float:
    """Return videos per second.

    Of a closed loop: until the last request was sent, because up to then all its slots were busy. Else: from
    the beginning until the last video was here, or until the phase was given up.
    """
    ends = sorted(row.ended_s for row in record.rows if in_hand(row) and row.ended_s is not None)
    if not ends:
        return 0.0
    span = ends[-1]
    if record.phase.mode == "closed":
        last_sent = max(row.sent_s or 0.0 for row in record.rows)
        if busy := [end for end in ends if end <= last_sent]:
            return len(busy) / last_sent
    elif record.counts()["unfinished"] and record.seconds is not None:
        span = record.seconds
    return len(ends) / span if span > 0 else 0.0


def phase_figures(record: Record, config: BenchServeConfig) -> Figures:
    """Return all figures of one phase."""
    phase, rows = record.phase, record.rows
    sent = [row for row in rows if row.sent_s is not None]
    good = sum(row.latency_s is not None and row.latency_s <= config.deadline_s for row in rows)
    achieved, here = throughput(record), sum(map(in_hand, rows))

    def spread(of: Callable[[Row], float | None], name: str, chosen: Sequence[Row] = rows) -> Figures | None:
        return distribution([of(row) for row in chosen], config, f"{phase.name}/{name}")

    kinds = list(dict.fromkeys(row.kind for row in rows))
    return {
        "name": phase.name,
        "mode": phase.mode,
        "rate": phase.rate,
        "utilisation": phase.utilisation,
        "concurrency": phase.concurrency if phase.mode == "closed" else None,
        "offset_s": record.offset_s,
        "seconds": record.seconds,
        "timed_out": record.timed_out,
        "offered_per_s": offered(record),
        "achieved_per_s": achieved,
        "goodput_per_s": achieved * good / here if here else 0.0,
        "goodput_share": good / len(sent) if sent else 0.0,
        "latency_s": spread(lambda row: row.latency_s, "latency"),
        "queue_s": spread(lambda row: row.queue_s if in_hand(row) else None, "queue"),
        "preview_s": spread(lambda row: row.preview_after_s, "preview"),
        "lag_s": spread(lambda row: row.lag_s, "lag"),
        "stages_s": mean_stages(rows),
        "by_kind": {
            kind: spread(lambda row: row.latency_s, kind, [row for row in rows if row.kind == kind])
            for kind in kinds
        },
        "codes": codes(rows),
        "accounting": accounting(rows),
        "broken_reads": sum(row.broken_reads for row in rows),
        "kills": after_kills(record.kills, rows),
    }


def offered(record: Record) -> float | None:
    """Return how many requests were sent per second, until the phase was cut off; None of a closed loop."""
    if not record.phase.rate:
        return None
    window = len(record.rows) / record.phase.rate
    sent = sum(row.sent_s is not None for row in record.rows)
    if sent < len(record.rows) and record.seconds:
        window = min(window, record.seconds)
    return sent / window


def codes(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Count codes by what they ended: shed (429), errors, failed, cancelled, and content that is no video."""
    named = {"shed": "shed", "error": "errors", "failed": "failed", "cancelled": "cancelled"}
    found = {
        name: dict(Counter(row.code or "unknown" for row in rows if row.outcome == outcome))
        for outcome, name in named.items()
    }
    return {**found, "content": dict(Counter(row.content_code for row in rows if row.content_code))}


def mean_stages(rows: Sequence[Row]) -> dict[str, float] | None:
    """Return mean seconds by stage, over the requests of which the server told them; None without any."""
    split = [stages for row in rows if (stages := row.stages()) is not None]
    if not split:
        return None
    return {name: float(np.mean([stages[name] for stages in split])) for name in STAGES}


def steps_ratio(
    first: Sequence[float], second: Sequence[float], chance: np.random.Generator, draws: int
) -> Figures:
    """Return the median of `second` over that of `first`, paired by place, with a 95 % bootstrap interval."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    places = chance.integers(len(a), size=(draws, len(a)))
    ratios = np.median(b[places], axis=1) / np.median(a[places], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    medians = (float(np.median(a)), float(np.median(b)))
    return {
        "first_s": medians[0],
        "second_s": medians[1],
        "ratio": medians[1] / medians[0],
        "low": float(low),
        "high": float(high),
        "pairs": len(a),
    }


def comparison(record: Record, config: BenchServeConfig) -> Figures | None:
    """Return the ratios of a comparison's two kinds: of the latency, and of denoising as the server times it.

    Only pairs of which both are known count; None if no pair is.
    """
    measures: dict[str, Callable[[Row], float | None]] = {
        "latency": lambda row: row.latency_s,
        "denoise": lambda row: row.timings.get("denoise_s") if in_hand(row) else None,
    }
    found: Figures = {}
    for name, of in measures.items():
        values = [of(row) for row in record.rows]
        pairs = [
            (a, b) for a, b in zip(values[::2], values[1::2], strict=True) if a is not None and b is not None
        ]
        if pairs and all(a > 0 for a, _ in pairs):
            first, second = zip(*pairs, strict=True)
            chance = generator(config.seed, f"bootstrap/compare/{name}")
            found[name] = steps_ratio(first, second, chance, config.num_draws)
    kinds = [row.kind for row in record.rows[:2]]
    return {"first": kinds[0], "second": kinds[1], **found} if found else None


def all_figures(run: Run, config: BenchServeConfig) -> Figures:
    """Return the figures of a run, finished or not."""
    compared = [comparison(record, config) for record in run.records if record.phase.mode == "compare"]
    return {
        "capacity_per_s": run.capacity_per_s,
        "cold_start": run.cold_start,
        "compare": compared[0] if compared else None,
        "phases": [phase_figures(record, config) for record in run.records if record.phase.mode != "warmup"],
        "warmup": [accounting(record.rows) for record in run.records if record.phase.mode == "warmup"],
        "accounting": accounting([row for record in run.records for row in record.rows]),
    }
