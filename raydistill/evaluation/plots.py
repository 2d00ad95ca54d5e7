"""Curves of the report: quality against steps, and losses of the runs that made the students."""

import io
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from raydistill.evaluation.candidates import HEAD, TAIL
from raydistill.evaluation.measures import ALL_RIGHT, BY_NAME

Row = Mapping[str, Any]
Panel = tuple[str, str, float]
"""Measure, title, what it is multiplied by."""
COLOURS = {
    "teacher": "#333333",
    "single": "#d55e00",
    "dual": "#0072b2",
}  # Okabe and Ito: told apart by all eyes
MORE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#332288", "#999933", "#882255")
RIGHT = (ALL_RIGHT, "all attributes right, %", 100.0)
PANELS = (("frechet", "Frechet distance (lower is better)", 1.0), RIGHT)
LOOKS = (
    ("watermark", "watermark (lower is better)", 1.0),
    ("sharpness", "sharpness (real clips have 1)", 1.0),
    RIGHT,
)
"""Where the question is how frames look."""
REAL = (
    ("teacher/latent_rmse", "latents' distance to the teacher's", 1.0),
    ("features/frechet", "Frechet distance of features (lower is better)", 1.0),
    ("sharpness", "sharpness (real clips have 1)", 1.0),
    ("motion", "motion (real clips have 1)", 1.0),
)
"""Of real teachers, of whose captions nothing is known."""
BETTER = {"higher": " (higher)", "lower": " (lower)", "one": " (near 1)"}


def encode_png(figure: Figure, dpi: int = 110) -> bytes:
    """PNG bytes; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """One colour per group, in order of appearance; the usual three always look the same."""
    free = [name for name in dict.fromkeys(groups) if name not in COLOURS]
    return {**COLOURS, **{name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(free)}}


def draw_quality(
    rows: Sequence[Row], null: Mapping[str, float] | None = None, *, panels: Sequence[Panel] = PANELS
) -> bytes:
    """Quality against the number of steps, a line per kind of sampler, bars for 95 % intervals.

    `rows` are the rows of results.json; `null` maps a measure to its value on real clips; `panels` are
    measures, titles and factors; those that no row has are left out.
    """
    panels = [panel for panel in panels if any(panel[0] in row["figures"] for row in rows)] or panels[:1]
    figure = Figure(figsize=(10 if len(panels) < 4 else 13, 4.2), layout="constrained")
    colours = group_colours([row["group"] for row in rows])
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        measure, title, scale = panel
        for number, group in enumerate(groups):
            mine = [row for row in rows if row["group"] == group and measure in row["figures"]]
            # A little aside, so that bars of equal steps do not hide each other.
            _draw_group(axes, mine, panel, colours[group], 1.02 ** (number - len(groups) // 2))
        if null and measure in null:
            axes.axhline(
                scale * null[measure], color="#999999", ls=":", lw=1.2, label="real clips, same number"
            )
        _steps_axis(axes, rows)
        axes.set_title(title, fontsize=10, loc="left")
        if measure.endswith("frechet"):
            axes.set_yscale("log")
    named = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
        )
    return encode_png(figure)


def draw_figures(
    rows: Sequence[Row], names: Sequence[str], null: Mapping[str, float] | None = None, columns: int = 4
) -> bytes:
    """Samplers of one number of steps: a line per sampler, a panel per measure, bars for 95 % intervals."""
    null, measures = null or {}, [BY_NAME[name] for name in names]
    columns, count = min(columns, len(measures)), len(rows)
    lines = -(-len(measures) // columns)
    figure = Figure(figsize=(2 + 2.3 * columns, lines * (0.9 + 0.24 * count)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    colours = group_colours([row["group"] for row in rows])
    for axes, measure in zip_longest(grid.flat, measures):
        if measure is None:
            axes.set_axis_off()
            continue
        for y, row in enumerate(rows):
            if (figures := row["figures"].get(measure.name)) is not None:
                value, low, high = (measure.scale * figures[key] for key in ("value", "low", "high"))
                bars = np.clip([[value - low], [high - value]], 0, None)
                axes.errorbar(value, y, xerr=bars, color=colours[row["group"]], marker="o", ms=4, capsize=2)
        if measure.name in null:
            axes.axvline(measure.scale * null[measure.name], color="#999999", ls=":", lw=1.2)
        axes.set_title(f"{measure.label}{BETTER[measure.better]}", fontsize=9, loc="left")
        axes.set_yticks(range(count), [row["label"] for row in rows], fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    return encode_png(figure)


def _draw_group(axes: Axes, rows: Sequence[Row], panel: Panel, colour: str, aside: float) -> None:
    measure, _, scale = panel
    rows = sorted(rows, key=lambda row: row["num_steps"])
    if not rows:
        return
    group = rows[0]["group"]
    value, low, high = (
        scale * np.array([row["figures"][measure][key] for row in rows]) for key in ("value", "low", "high")
    )
    bars = np.clip([value - low, high - value], 0, None)
    line = "-" if len(rows) > 1 else ""
    marker = "o" if len(rows) > 1 else "D"
    x = [row["num_steps"] * aside for row in rows]
    axes.errorbar(
        x, value, yerr=bars, color=colour, ls=line, marker=marker, ms=4.5, lw=1.6, capsize=3, label=group
    )


def _steps_axis(axes: Axes, rows: Sequence[Row]) -> None:
    counts = [row["num_steps"] for row in rows]
    # Mixtures of teacher and student, of many steps each, would crowd the axis.
    steps = sorted({row["num_steps"] for row in rows if row["group"] not in (TAIL, HEAD)})
    steps = steps or sorted(set(counts)) or [1]
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(s) for s in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a killed run left half-written is dropped."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    read = []
    for number, line in enumerate(lines):
        try:
            read.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    return read


def draw_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Loss terms against steps, a row per run and stage; beside it the distance to the goal by noise."""
    stages = [
        (f"{name}, {stage}" if stage else name, [line for line in lines if line.get("stage", "") == stage])
        for name, lines in runs.items()
        for stage in dict.fromkeys(line.get("stage", "") for line in lines)
    ]
    figure = Figure(figsize=(10, 2.8 * len(stages)), layout="constrained")
    grid = figure.subplots(len(stages), 2, squeeze=False)
    for (left, right), (title, lines) in zip(grid, stages, strict=True):
        keys = dict.fromkeys(key for line in lines for key in line)
        terms = {key: key.removeprefix("loss/") for key in keys if key.startswith("loss/")}
        _draw_terms(left, title, lines, terms)
        split = [key.split("/") for key in keys if key.startswith("bucket/")]
        parted = dict.fromkeys(term for _, _, term in split)
        first = next((term for term in ("consistency", "motion") if term in parted), next(iter(parted), None))
        buckets = {f"bucket/{span}/{term}": f"t {span}" for _, span, term in split if term == first}
        if buckets:
            _draw_terms(right, f"{title}: {first} by noise", lines, buckets)
        else:
            right.set_axis_off()
    return encode_png(figure)


def _draw_terms(axes: Axes, title: str, lines: Sequence[Mapping[str, Any]], terms: Mapping[str, str]) -> None:
    positive = True
    for term, label in terms.items():
        points = [(line["step"], line[term]) for line in lines if line.get(term) is not None]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        positive &= bool((values > 0).all())
        axes.plot(steps, _smooth(values), lw=1.4, label=label, marker="o" if len(steps) == 1 else "")
    axes.set_yscale("log" if positive and terms else "linear")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if terms:
        axes.legend(fontsize=7, frameon=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take a running mean over a fortieth of the run: few-sample losses are noisy."""
    width = max(1, len(values) // 40)
    if not len(values):
        return values
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
