"""Plots of a load run, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raydistill.service.load.figures import STAGES
from raydistill.service.load.rows import Run

Phase = Mapping[str, Any]
Results = Mapping[str, Any]
PERCENTILES = {"p50": "#0072b2", "p95": "#e69f00", "p99": "#d55e00"}  # Okabe and Ito: told apart by all eyes
STAGE_COLOURS = ("#999999", "#56b4e9", "#0072b2", "#009e73", "#e69f00")
PHASE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#332288", "#999933")
KILL_COLOUR = "#d55e00"


def draw_all(results: Results, run: Run) -> dict[str, bytes]:
    """Return {name: PNG} of the plots that there is something for."""
    phases = results["phases"]
    swept = [one for one in phases if one["mode"] == "open"] or [
        one for one in phases if one["mode"] == "closed"
    ]
    drawn = dict[str, bytes]()
    if swept:
        drawn["latency"] = draw_latency(swept, results)
        drawn["throughput"] = draw_throughput(swept, results)
    if staged := [one for one in phases if one["stages_s"]]:
        drawn["stages"] = draw_stages(staged)
    if any(row.latency_s is not None for record in run.records for row in record.rows):
        drawn["timeline"] = draw_timeline(run)
    return drawn


def draw_latency(phases: Sequence[Phase], results: Results) -> bytes:
    """Draw percentiles of the latency against the load, bars for 95 % intervals, a line for the deadline."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    known = [one for one in phases if one["latency_s"]]
    for name, colour in PERCENTILES.items():
        values = np.array([one["latency_s"][name] for one in known])
        ends = [[one["latency_s"].get(f"{name}_{end}", np.nan) for one in known] for end in ("low", "high")]
        bars = np.clip([values - ends[0], np.array(ends[1]) - values], 0, None) if known else None
        axes.errorbar(
            [_load(one) for one in known], values, yerr=bars, color=colour, marker="o", capsize=3, label=name
        )
    deadline = results["settings"]["deadline_s"]
    axes.axhline(deadline, color="#333333", ls="--", lw=1.2, label=f"deadline {deadline:g} s")
    axes.set_yscale("log")
    axes.set_ylabel("seconds from the intended arrival")
    _finish(axes, phases, results)
    return _png(figure)


def draw_throughput(phases: Sequence[Phase], results: Results) -> bytes:
    """Draw videos per second, and those within the deadline, against the load."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    loads = [_load(one) for one in phases]
    achieved = [one["achieved_per_s"] for one in phases]
    axes.plot(loads, achieved, color="#0072b2", marker="o", ms=10, mfc="none", label="completed")
    axes.plot(
        loads,
        [one["goodput_per_s"] for one in phases],
        color="#009e73",
        marker="s",
        label="within the deadline",
    )
    if phases[0]["mode"] == "open":
        axes.plot(loads, loads, color="#999999", ls=":", lw=1.2, label="offered")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("videos per second")
    _finish(axes, phases, results)
    return _png(figure)


def draw_stages(phases: Sequence[Phase]) -> bytes:
    """Draw the mean seconds that each stage took, stacked, a bar per phase."""
    figure = Figure(figsize=(7, 0.9 + 0.42 * len(phases)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(phases))
    for name, colour in zip(STAGES, STAGE_COLOURS, strict=True):
        # Clocks of two machines may make a rest slightly negative.
        wide = np.clip([one["stages_s"][name] for one in phases], 0, None)
        axes.barh(range(len(phases)), wide, left=left, color=colour, label=name)
        left += wide
    axes.set_yticks(range(len(phases)), [one["name"] for one in phases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean seconds")
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=len(STAGES), fontsize=8, frameon=False)
    return _png(figure)


def draw_timeline(run: Run) -> bytes:
    """Draw each video's latency, and how many there are, by the time of its end; lines mark kills."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    every, marked = list[float](), False
    for place, record in enumerate(run.records):
        points = sorted(
            (record.offset_s + row.ended_s, row.latency_s)
            for row in record.rows
            if row.latency_s is not None and row.ended_s is not None
        )
        if points:
            times, latencies = zip(*points, strict=True)
            colour = PHASE_COLOURS[place % len(PHASE_COLOURS)]
            upper.scatter(times, latencies, s=9, color=colour, label=record.phase.name)
            every += times
        for kill in record.kills:
            if kill.pid is not None:
                for axes in (upper, lower):
                    axes.axvline(
                        record.offset_s + kill.at_s, color=KILL_COLOUR, lw=1, label=None if marked else "kill"
                    )
                    marked = True
    lower.step(sorted(every), range(1, len(every) + 1), where="post", color="#333333", lw=1.4)
    upper.set_ylabel("latency, s")
    lower.set_ylabel("videos so far")
    lower.set_xlabel("seconds of the run")
    for axes in (upper, lower):
        _plain(axes)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return _png(figure)


def _load(phase: Phase) -> float:
    """Return where a phase stands on the axis of loads."""
    return phase["rate"] if phase["mode"] == "open" else phase["concurrency"]


def _finish(axes: Axes, phases: Sequence[Phase], results: Results) -> None:
    """Name the axis of loads, mark the capacity on it, and add the legend."""
    opened = phases[0]["mode"] == "open"
    if opened and results["capacity_per_s"]:
        axes.axvline(results["capacity_per_s"], color="#999999", ls="-.", lw=1.2, label="capacity")
    axes.set_xlabel("offered, requests per second" if opened else "requests open at a time")
    _plain(axes)
    axes.legend(fontsize=8, frameon=False)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    """Return PNG bytes; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
