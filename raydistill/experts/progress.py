"""The driver's view of a run: a progress bar fed by `metrics.jsonl`, which rank 0 writes."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from raydistill.artifacts import write_atomically
from raydistill.experts.tracking import METRICS

LOOK_EVERY_S = 0.5
LINE_EVERY_S = 15.0
"""Without a terminal: at most one line in this time."""


def read_metrics(run_dir: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Return all records, of one stage if given. A last line that is still being written is left out."""
    records = [json.loads(line) for line in _lines_of(run_dir) if line.endswith("\n")]
    return [r for r in records if stage in (None, r["stage"])]


def forget_after(run_dir: Path, stage: str, step: int) -> None:
    """Drop a stage's records after `step`, which the run that resumes there writes again, and a torn line.

    Only while nobody writes: to what is left of a line the next record would be appended.
    """
    kept = [r for r in read_metrics(run_dir) if r["stage"] != stage or r["step"] <= step]
    if len(kept) < len(_lines_of(run_dir)):
        text = "".join(json.dumps(r) + "\n" for r in kept)
        write_atomically(run_dir / METRICS, text.encode())


def _lines_of(run_dir: Path) -> list[str]:
    """Return the lines of the file with their ends; a torn one has none."""
    try:
        # A torn tail may be anything, after a power cut even no text.
        text = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines(keepends=True)


@contextmanager
def progress(run_dir: Path, stage: str, start: int, num_steps: int) -> Iterator[None]:
    """Show steps, rate, time left and losses while the block runs: a bar on a terminal, else some lines."""
    finished = threading.Event()
    show = _bar if Console(stderr=True).is_terminal else _lines
    thread = threading.Thread(target=show, args=(run_dir, stage, start, num_steps, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def describe(record: Mapping[str, Any], num_steps: int) -> str:
    """Return '11.2 steps/s, 43 s left, consistency 0.0123' from one record."""
    rate = record.get("steps_per_s", 0.0)
    parts = [f"{rate:.3g} steps/s, {(num_steps - record['step']) / rate:.0f} s left"] if rate else []
    parts += [f"{k.removeprefix('loss/')} {v:.4g}" for k, v in record.items() if k.startswith("loss/")]
    return ", ".join(parts)


def _bar(run_dir: Path, stage: str, start: int, num_steps: int, finished: threading.Event) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(stage, total=num_steps, completed=start, note="starting workers")
        last = False
        while not last:
            last = finished.wait(LOOK_EVERY_S)
            records = read_metrics(run_dir, stage)
            if records and records[-1]["step"] > start:
                bar.update(task, completed=records[-1]["step"], note=describe(records[-1], num_steps))


def _lines(run_dir: Path, stage: str, start: int, num_steps: int, finished: threading.Event) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{stage}: step {start} of {num_steps}, starting workers")
    shown = start
    last = False
    while not last:
        last = finished.wait(LINE_EVERY_S)
        records = read_metrics(run_dir, stage)
        if records and records[-1]["step"] > shown:
            shown = records[-1]["step"]
            console.print(f"{stage}: step {shown} of {num_steps}, {describe(records[-1], num_steps)}")
