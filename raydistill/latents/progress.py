"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0


class Meter:
    """Shows files done, and at which rate clips come."""

    def __init__(self, title: str, total: int, bar: Progress | None):
        """`bar` is None where no terminal is."""
        self.title, self.total, self.bar = title, total, bar
        self.began = self.said = time.monotonic()
        self.already: int | None = None
        self.task = bar.add_task(title, total=total, note="") if bar else None

    def show(self, done: int, *, read: int = 0, clips: int = 0, video_s: float = 0.0, bad: int = 0) -> None:
        """Show files `done` of the total; bytes `read`, `clips`, `video_s` are of this run, `bad` of all."""
        if self.already is None:
            self.already = done  # by an earlier run: no part of the rate
        now = time.monotonic()
        spent = max(now - self.began, 1e-9)
        note = f"{clips / spent:.1f} clips/s, {video_s / spent:.1f} video-s/s" if clips else ""
        note += f"{read / spent / 1e6:.0f} MB/s" if read else ""
        note += (", " if note else "") + f"{bad} bad" if bad else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif done >= self.total or now - self.said >= LINE_EVERY_S:
            self.said = now
            rate = (done - self.already) / spent
            time_ = (
                f"{(self.total - done) / rate:.0f} s left" if rate and done < self.total else f"{spent:.1f} s"
            )
            parts = (f"{self.title}: {done}/{self.total} files", time_, note)
            sys.stderr.write(", ".join(part for part in parts if part) + "\n")


@contextmanager
def meter(title: str, total: int) -> Iterator[Meter]:
    """Show progress during a `with` block."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(title, total, None)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        yield Meter(title, total, bar)
