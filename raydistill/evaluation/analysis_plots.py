"""The picture of `jobs/distill.py --analyse`: where on the path a student has trouble (DCM, figs. 2, 10)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from raydistill.artifacts import write_atomically, write_json
from raydistill.evaluation.plots import encode_png

SEMANTIC, DETAIL = "#d55e00", "#0072b2"


def draw_analysis(result: Mapping[str, Any], path: str | Path) -> None:
    """Write `path` (PNG) and, beside it with the suffix .json, the numbers drawn.

    `result` holds plain lists; every key but `times` may be missing, and its panel is then left out:

    * `times`: K decreasing times in (0, 1] from which a jump was measured (grid nodes, bucket middles).
    * `steps`: S training steps at which the two following were taken.
    * `loss`: S x K, the consistency loss by training step and time (DCM, fig. 2b); None where not measured.
    * `gradient`: S x K, the norm of its gradient over the trained weights (DCM, fig. 2b); None likewise.
    * `change_times`, `change`: times t_i of the teacher's path, decreasing, and the mean |x0_i - x0_{i-1}|
      per element between its successive predictions of the clean clip; entry i belongs to the one at t_i.
    * `boundary`: the time proposed for the hand-over; `in_use`: the one in the config, if another.
    * `title`: one line, e.g. the teacher's folder and the number of samples.

    Raises KeyError without `times`, ValueError when a table's width is not the number of times.
    """
    times = np.asarray(result["times"], dtype=np.float64)
    panels = [
        (key, label)
        for key, label in (
            ("loss", "consistency loss"),
            ("gradient", "gradient norm"),
            ("change", "change of x0"),
        )
        if key in result
    ]
    figure = Figure(figsize=(4.6 * max(len(panels), 1), 3.9), layout="constrained")
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False).ravel()
    for axes, (key, label) in zip(grid, panels, strict=False):
        if key == "change":
            axes.plot(result["change_times"], result["change"], color="#333333", lw=1.6, marker="o", ms=2.5)
            axes.set_title("mean |x0_i - x0_(i-1)| along the teacher's path", fontsize=10, loc="left")
        else:
            _draw_table(axes, times, result, key)
            axes.set_title(f"{label} by time and training step", fontsize=10, loc="left")
        _finish(axes, result)
    figure.suptitle(result.get("title", ""), fontsize=10)
    path = Path(path)
    write_atomically(path, encode_png(figure))
    write_json(path.with_suffix(".json"), {key: _plain(value) for key, value in result.items()})


def _draw_table(axes: Axes, times: np.ndarray, result: Mapping[str, Any], key: str) -> None:
    table = np.asarray(result[key], dtype=np.float64)  # None becomes NaN and is not drawn
    steps = result.get("steps", list(range(len(table))))
    if table.shape != (len(steps), len(times)):
        raise ValueError(f"{key} is {table.shape}: expected {len(steps)} steps x {len(times)} times")
    shade = Normalize(-0.35 * len(steps), max(len(steps) - 1, 1))
    for number, (step, row) in enumerate(zip(steps, table, strict=True)):
        axes.plot(times, row, color=colormaps["viridis_r"](shade(number)), lw=1.5, label=f"step {step}")
    if np.nanmin(table) > 0:
        axes.set_yscale("log")
    axes.legend(fontsize=7, frameon=False, loc="lower left")


def _finish(axes: Axes, result: Mapping[str, Any]) -> None:
    """Noise on the left, as the sampler goes; the two experts' ranges in faint colour."""
    axes.set_xlim(1.0, 0.0)
    axes.set_xlabel("t  (1 is noise, 0 is data)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    boundary = result.get("boundary")
    if boundary is not None:
        axes.axvline(boundary, color="black", lw=1.1, ls="--")
        axes.axvspan(1.0, boundary, color=SEMANTIC, alpha=0.06, lw=0)
        axes.axvspan(boundary, 0.0, color=DETAIL, alpha=0.06, lw=0)
        axes.annotate(
            f"proposed {boundary:.3g}", (boundary, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    if result.get("in_use") not in (None, boundary):
        axes.axvline(result["in_use"], color="grey", lw=1, ls=":")


def _plain(value: Any) -> Any:
    """Make lists of arrays, None of what was not measured: JSON has no NaN."""
    if isinstance(value, str | int | float | None):
        return None if isinstance(value, float) and not np.isfinite(value) else value
    return [_plain(item) for item in np.asarray(value, dtype=object).tolist()]
