"""What a load run leaves: results.json, requests.jsonl, report.md, plots; and how it shows itself."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from raydistill.artifacts import write_atomically, write_json
from raydistill.config.bench_serve import BenchServeConfig
from raydistill.service.load.figures import all_figures
from raydistill.service.load.rows import Record, Run

SCHEMA_VERSION = 1
LINE_EVERY_S = 10.0
PLOTS = ("latency", "throughput", "stages", "timeline")
COLUMNS = (
    "phase", "offered/s", "achieved/s", "goodput/s", "in time", "p50 s", "p95 s", "p99 s", "mean s",
    "queue p50 s", "preview p50 s", "shed", "errors", "failed", "unfinished",
)  # fmt: skip
ON_TERMINAL = ("phase", "achieved/s", "in time", "p50 s", "p95 s", "shed", "errors", "unfinished")
ENDED = ("completed", "failed", "cancelled", "shed", "error")


def write_run(config: BenchServeConfig, run: Run) -> dict[str, Any]:
    """Write all of a run into `config.output`, finished or not, and return what results.json holds.

    requests.jsonl has a line per request, those of the warm-up too; results.json is written last.
    """
    from raydistill.service.load.plots import draw_all

    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "schema_version": SCHEMA_VERSION,
        "finished": run.finished,
        "started_at": run.started_at,
        # The name of the key's variable is in the settings; the key itself is nowhere.
        "settings": asdict(config),
        "machine": {
            "node": platform.node(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "models": run.models,
        **all_figures(run, config),
    }
    lines = [json.dumps(row.as_dict(), allow_nan=False) for record in run.records for row in record.rows]
    write_atomically(folder / "requests.jsonl", "".join(line + "\n" for line in lines).encode())
    drawn = draw_all(results, run)
    for name in PLOTS:
        if name in drawn:
            write_atomically(folder / f"{name}.png", drawn[name])
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier run's
    write_atomically(folder / "report.md", report(results, sorted(drawn, key=PLOTS.index)).encode())
    write_json(folder / "results.json", results)
    return results


def cells(phase: Mapping[str, Any]) -> list[str]:
    """Return the table's line of one phase."""
    counts, latency = phase["accounting"], phase["latency_s"] or {}
    return [
        phase["name"] + (" (timed out)" if phase["timed_out"] else ""),
        number(phase["offered_per_s"]),
        number(phase["achieved_per_s"]),
        number(phase["goodput_per_s"]),
        f"{100 * phase['goodput_share']:.0f} %",
        interval(latency, "p50"),
        interval(latency, "p95"),
        number(latency.get("p99")),
        number(latency.get("mean")),
        number((phase["queue_s"] or {}).get("p50")),
        number((phase["preview_s"] or {}).get("p50")),
        *(str(counts[name]) for name in ("shed", "errors", "failed", "unfinished")),
    ]


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def interval(figures: Mapping[str, Any], name: str) -> str:
    """A figure with its interval: '1.2 [1.1, 1.4]'."""
    if name not in figures:
        return "-"
    low, high = (number(figures[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{number(figures[name])} [{low}, {high}]"


def report(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Return report.md."""
    settings, phases = results["settings"], results["phases"]
    state = "" if results["finished"] else "**Unfinished**: it was stopped, and this is what there is.\n\n"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(results["started_at"]))
    parts = [
        f"# Load on {settings['base_url']}\n\n{state}{when}, {results['machine']['node']}, "
        f"{results['machine']['cpus']} CPUs, follow={settings['follow']}, seed {settings['seed']}.\n",
        "Latency is counted from the intended arrival, over completed requests; 95 % intervals in brackets. "
        f"Goodput: videos here within {settings['deadline_s']:g} s. Shed: answered 429.\n",
        table(COLUMNS, [cells(phase) for phase in phases]),
        *_single_figures(results),
        *_stages(phases),
        *_kinds(phases),
        *_kills(phases),
        _accounting(results),
        *(f"![{name}]({name}.png)\n" for name in plots),
    ]
    return "\n".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(one.replace("|", "\\|") for one in row) + " |\n" for row in rows)


def _single_figures(results: Mapping[str, Any]) -> list[str]:
    lines = list[str]()
    if results["capacity_per_s"]:
        lines.append(f"Capacity, the best closed loop: {number(results['capacity_per_s'])} videos/s.\n")
    if cold := results["cold_start"]:
        seconds = "not measured" if cold["latency_s"] is None else f"{number(cold['latency_s'])} s"
        lines.append(
            f"Cold start, from no sampler to the video: {seconds} "
            f"(waited {number(cold['waited_s'])} s for there to be none).\n"
        )
    compared = results["compare"] or {}
    for measure in ("latency", "denoise"):
        if one := compared.get(measure):
            lines.append(
                f"{measure}: {compared['second']} takes {number(one['ratio'])} "
                f"[{number(one['low'])}, {number(one['high'])}] times as long as {compared['first']} "
                f"(medians {number(one['second_s'])} s and {number(one['first_s'])} s, "
                f"{one['pairs']} pairs).\n"
            )
    return lines


def _stages(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [phase for phase in phases if phase["stages_s"]]
    if not known:
        return []
    names = list(known[0]["stages_s"])
    lines = [[phase["name"], *(number(phase["stages_s"][name]) for name in names)] for phase in known]
    return ["## Mean seconds by stage\n", table(["phase", *names], lines)]


def _kinds(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        [phase["name"], kind, str(figures["count"]), interval(figures, "p50"), interval(figures, "p95")]
        for phase in phases
        if len(phase["by_kind"]) > 1
        for kind, figures in phase["by_kind"].items()
        if figures
    ]
    head = ["phase", "request", "videos", "p50 s", "p95 s"]
    return ["## Latency by kind of request\n", table(head, lines)] if lines else []


def _kills(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        [
            phase["name"],
            number(kill["at_s"]),
            f"{kill['worker_id']} ({kill['pid']})" if kill["pid"] else f"none: {kill['why_not']}",
            number(kill["next_completion_s"]),
            str(kill["under_way"]),
            str(kill["restarted"]),
            number(kill["all_done_s"]),
        ]
        for phase in phases
        for kill in phase["kills"]
    ]
    head = ["phase", "at s", "killed", "s to the next completion", "under way", "restarted", "s to the last"]
    return ["## Kills\n", table(head, lines)] if lines else []


def _accounting(results: Mapping[str, Any]) -> str:
    """Return what became of all requests, with the ids of those that were accepted and did not complete."""
    counts, broken = results["accounting"], sum(phase["broken_reads"] for phase in results["phases"])
    ended = " + ".join(
        f"{counts[name]} {name}" for name in ("completed", "failed", "cancelled", "unfinished")
    )
    lines = [
        "## Accounting, the warm-up included\n",
        f"{counts['requests']} requests, {counts['sent']} sent: {counts['accepted']} accepted, "
        f"{counts['shed']} shed, {counts['errors']} errors. Accepted: {ended}"
        f"{'' if counts['balanced'] else '. **This does not add up**'}. "
        f"{counts['restarted']} needed more than one attempt; {broken} reads of states failed.\n",
    ]
    lines += [f"- {name}: {', '.join(ids)}" for name, ids in counts["ids"].items() if ids]
    lines += [f"- two requests got the same id: {', '.join(counts['duplicates'])}"] * bool(
        counts["duplicates"]
    )
    lines += [f"- completed, unsaid: {', '.join(counts['unannounced'])}"] * bool(counts["unannounced"])
    for phase in results["phases"]:
        for what, codes in phase["codes"].items():
            if codes:
                told = ", ".join(f"{code} {count}" for code, count in codes.items())
                lines.append(f"- {phase['name']}, {what}: {told}")
    return "\n".join(lines) + "\n"


def rich_table(results: Mapping[str, Any]) -> Table:
    """Return what of the phases' table fits into 80 columns: no intervals."""
    shown = Table(title=None if results["finished"] else "unfinished")
    for name in ON_TERMINAL:
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for phase in results["phases"]:
        row = dict(zip(COLUMNS, cells(phase), strict=True))
        shown.add_row(*(row[name].partition(" [")[0] for name in ON_TERMINAL))
    return shown


@contextmanager
def progress() -> Iterator[Callable[[Record], None]]:
    """Yield what `measure` is to call: a bar per phase on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines().show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        tasks = dict[int, Any]()

        def show(record: Record) -> None:
            if id(record) not in tasks:
                tasks[id(record)] = bar.add_task(record.phase.name, total=len(record.rows), note="")
            done, note = state_of(record)
            bar.update(tasks[id(record)], completed=done, note=note)

        yield show


def state_of(record: Record) -> tuple[int, str]:
    """Return how many of a phase's requests have ended, and a line on them."""
    counts = record.counts()
    under_way = counts["sent"] + counts["unfinished"]
    told = {
        "under way": under_way,
        "shed": counts["shed"],
        "errors": counts["error"],
        "failed": counts["failed"],
    }
    told["kills"] = sum(kill.pid is not None for kill in record.kills)
    return sum(counts[name] for name in ENDED), ", ".join(f"{n} {name}" for name, n in told.items() if n)


class _Lines:
    """Progress without a terminal."""

    def __init__(self):
        self.said = 0.0

    def show(self, record: Record) -> None:
        """Write a line when the phase has ended, and every 10 s until then."""
        now = time.monotonic()
        if record.seconds is None and now - self.said < LINE_EVERY_S:
            return
        self.said = now
        done, note = state_of(record)
        line = f"{record.phase.name}: {done}/{len(record.rows)}" + (f", {note}" if note else "")
        sys.stderr.write(line + "\n")
