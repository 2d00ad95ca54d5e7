"""Speed and memory at Wan2.1-1.3B's size with random weights: what steps take, what each trick brings.

    python tests/bench/gpu.py [--only semantic,sampling] [--output build/gpu]      on a GPU
    python tests/bench/gpu.py --toy [--only ...]                                   a toy size on a CPU

Every way of a section does the same work, the first one is the reference of its ratios; one that another
section has measured is not measured again. Where time on a GPU is short, `--only` takes all of it in
parts, each with an `--output` of its own. A way that fails, for want of memory or else, is a row that says
so and makes the exit status 1; the others go on.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from gpu_sections import SECTIONS
from gpu_setup import REAL, TOY, Figures, Setup, Size
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARE, SPEEDUP = 0.5, 24.0
"""Goals: of the measured matmul rate in the semantic step; of the teacher's latency over the student's."""


@dataclass
class Row:
    """One way to do a section's work."""

    section: str
    way: str
    figures: Figures = field(default_factory=dict)
    failed: str = ""
    """Why there are no figures."""


def measure(setup: Setup, names: Sequence[str], rows: list[Row], done: Callable[[str], None]) -> None:
    """Run the sections and add their rows, what fails too; `done` is told of each."""
    for name in names:
        for way, work in SECTIONS[name](setup).items():
            began = time.perf_counter()
            row = Row(name, way)
            try:
                row.figures = work()
            except torch.OutOfMemoryError as full:
                row.failed = f"out of memory: {str(full).splitlines()[0]}"
            except Exception as failed:
                row.failed = f"{type(failed).__name__}: {failed}"
            setup.held()  # frees what the way has left
            rows.append(row)
            told = row.failed or f"{row.figures['seconds']:.3g} s"
            done(f"{name}: {way}: {told} ({time.perf_counter() - began:.0f} s in all)")


def relative(rows: Sequence[Row], key: str) -> dict[tuple[str, str], float]:
    """Each way's figure over that of its section's first."""
    found = dict[tuple[str, str], float]()
    for name in dict.fromkeys(row.section for row in rows):
        first, *_ = ours = [row for row in rows if row.section == name]
        if key in first.figures:
            found |= {(name, r.way): r.figures[key] / first.figures[key] for r in ours if key in r.figures}
    return found


def goals(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """(reached, wanted) of every goal whose section was measured."""
    found = dict[str, tuple[float, float]]()
    # The step is one, whichever kernel of attention takes it.
    steps = [row for row in rows if row.section in ("semantic", "attention") and "share" in row.figures]
    if steps:
        best = max(steps, key=lambda row: row.figures["share"])
        kernel = best.way if best.section == "attention" else "native"
        what = f"semantic step, share of the matmul rate, attention {kernel}"
        found[what] = (best.figures["share"], SHARE)
    for (name, way), ratio in relative(rows, "seconds").items():
        if name == "sampling" and way.startswith("teacher"):
            found["sampling, teacher over student"] = (ratio, SPEEDUP)
    return found


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Ratios first; seconds and GiB are of this machine."""
    shown, times, peaks = Table(title=title), relative(rows, "seconds"), relative(rows, "peak_gib")
    for head in ("section", "way", "time ratio", "peak ratio", "s", "first s", "peak GiB", "plan/peak"):
        shown.add_column(head, justify="left" if head in ("section", "way") else "right")
    for head in ("TFLOP", "TFLOP/s", "of matmul"):
        shown.add_column(head, justify="right")
    for row in rows:
        if row.failed:
            shown.add_row(row.section, row.way, "failed", row.failed[:60])
            continue
        f, key = row.figures, (row.section, row.way)
        plan = f"{f['planned_gib'] / f['peak_gib']:.2f}" if "planned_gib" in f else ""
        ratios = (f"{one[key]:.2f}" if key in one else "?" for one in (times, peaks))
        absolute = (f"{f[name]:.3g}" for name in ("seconds", "first_seconds", "peak_gib"))
        work = (f"{f[name]:.3g}" if name in f else "" for name in ("model_tflop", "tflops"))
        share = f"{f['share']:.0%}" if "share" in f else ""
        shown.add_row(row.section, row.way, *ratios, *absolute, plan, *work, share)
    return shown


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars: time and peak memory of each way over its section's first, and shares of the matmul rate."""
    drawn = [row for row in rows if row.figures][::-1]
    shares = {(row.section, row.way): row.figures.get("share", 0.0) for row in rows}
    labels = [f"{row.section}: {row.way}" for row in drawn]
    columns = [
        ("time over the section's first", relative(rows, "seconds"), 1.0),
        ("peak memory over the section's first", relative(rows, "peak_gib"), 1.0),
        (f"share of the matmul rate, goal {SHARE:g}", shares, SHARE),
    ]
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 1.2 + 0.32 * len(drawn)), sharey=True, layout="constrained"
    )
    for axis, (head, values, line) in zip(axes, columns, strict=True):
        found = [values.get((row.section, row.way), 0.0) for row in drawn]
        bars = axis.barh(labels, found, color="#4477aa")
        axis.bar_label(bars, [f"{value:.2f}" if value else "" for value in found], padding=2, fontsize=8)
        axis.axvline(line, color="#bb4444", linewidth=1)
        axis.set_xlabel(head)
        axis.margins(x=0.12)
    axes[0].set_xscale("log")  # latency of the teacher is far beyond what tricks bring
    axes[0].set_xlim(0.3, None)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine(device: str) -> str:
    """What the figures belong to."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def write(setup: Setup, rows: Sequence[Row], output: Path) -> None:
    """Write gpu.json."""
    about = {"device": machine(setup.device.type), "torch": torch.__version__, "size": setup.size.name}
    found = {"matmul_tflops": setup.matmul / 1e12, "goals": goals(rows), "rows": [vars(row) for row in rows]}
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(about | found, indent=1))


def report(setup: Setup, rows: Sequence[Row], output: Path, console: Console) -> int:
    """Print table and goals, draw gpu.png; return the exit status."""
    on_gpu = setup.device.type == "cuda"
    title = f"{setup.size.name} on {machine(setup.device.type)}, torch {torch.__version__}"
    console.print(table_of(rows, title))
    for what, (value, wanted) in goals(rows).items():
        met = ("reached" if value >= wanted else "missed") if on_gpu else "not for a CPU"
        console.print(f"goal, {what}: {value:.2f}, at least {wanted:g}: {met}")
    picture(rows, output / "gpu.png", title)
    console.print(f"{output}/gpu.json and gpu.png")
    return 1 if any(row.failed for row in rows) else 0


def bench(size: Size, device: str, names: Sequence[str], output: Path, *, repeats: int = 0) -> int:
    """Measure and report; what there is so far is always in gpu.json, should it be cut short."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        setup, rows = Setup(size, Path(folder), device, repeats=repeats), list[Row]()
        began, rate = time.perf_counter(), setup.matmul / 1e12
        console.print(f"matmul of {size.matmul}^2 in {size.precision}: {rate:.3g} TFLOP/s")

        def done(line: str) -> None:
            write(setup, rows, output)
            console.print(f"[{time.perf_counter() - began:5.0f} s] {line}", markup=False, highlight=False)

        measure(setup, names, rows, done)
        return report(setup, rows, output, console)


def main(argv: Sequence[str]) -> int:
    """Read the command line; see the module."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--toy", action="store_true", help="a toy size on the CPU")
    asked.add_argument("--only", default=",".join(SECTIONS), help=f"sections of: {','.join(SECTIONS)}")
    asked.add_argument("--repeats", type=int, default=0, help="steps measured of each way")
    asked.add_argument(
        "--output", type=Path, default=Path("build/gpu"), help="folder of gpu.json and gpu.png"
    )
    given = asked.parse_args(argv)
    names = given.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        asked.error(f"--only: no section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    if not given.toy and not torch.cuda.is_available():
        asked.error("no GPU here: take --toy, whose ratios say nothing of a GPU")
    size, device = (TOY, "cpu") if given.toy else (REAL, "cuda")
    return bench(size, device, names, given.output, repeats=given.repeats)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
