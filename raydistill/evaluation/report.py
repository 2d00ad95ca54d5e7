"""The report: one HTML file that needs no network, and its parts as files for a README."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raydistill.artifacts import write_atomically
from raydistill.errors import InvalidValue
from raydistill.evaluation.measures import MEASURES, Measure

README_COLUMNS = (
    "frechet", "right/all", "path/direction", "path/speed_error", "path/jitter", "sharpness", "teacher/psnr"
)  # fmt: skip
WITH_INTERVAL = ("frechet", "right/all")
LOOK_COLUMNS = (
    "right/all", "right/direction", "right/speed", "path/direction", "sharpness", "watermark", "spectrum",
    "vividness",
)  # fmt: skip
"""Of motion students: what their frames look like, and whether their motion is as asked."""
LOOK_WITH_INTERVAL = ("right/all", "sharpness", "watermark")
PICTURES = {"quality": "quality.png", "strips": "strips.png", "clips": "clips.gif", "losses": "losses.png"}
DOCS_LIMIT_BYTES = 1_500_000

Results = Mapping[str, Any]


def write_report(results: Results, pictures: Mapping[str, bytes], output: str | Path) -> Path:
    """Write report.html and report/{table.md, quality.png, strips.png, clips.gif, losses.png} below `output`.

    `results` is what results.json holds; `pictures` maps a key of PICTURES to file bytes, and may lack any.
    Returns the HTML's path.
    """
    output = Path(output)
    for name, data in pictures.items():
        write_atomically(output / "report" / PICTURES[name], data)
    for name in PICTURES.keys() - pictures.keys():  # of an earlier run that had it
        (output / "report" / PICTURES[name]).unlink(missing_ok=True)
    write_atomically(output / "report" / "table.md", markdown_table(results).encode())
    write_atomically(output / "report.html", html(results, pictures).encode())
    return output / "report.html"


def shown_measures(results: Results, only: Sequence[str] | None = None) -> list[Measure]:
    """Measures that at least one row has, in the order of MEASURES."""
    there = {name for row in all_rows(results) for name in row["figures"]}
    return [m for m in MEASURES if m.name in there and (only is None or m.name in only)]


def all_rows(results: Results) -> list[Mapping[str, Any]]:
    """Samplers, then what no sampler made."""
    return [*results["rows"], *results["reference"]]


def _number(measure: Measure, value: float) -> str:
    return f"{measure.scale * value:.{measure.digits}f}"


def _cell(measure: Measure, row: Mapping[str, Any]) -> tuple[str, str]:
    figure = row["figures"].get(measure.name)
    if figure is None:
        return "-", ""
    return _number(
        measure, figure["value"]
    ), f"{_number(measure, figure['low'])} to {_number(measure, figure['high'])}"


def _seconds(results: Results, row: Mapping[str, Any]) -> tuple[str, str]:
    timed = results["latency"].get(str(results["settings"]["latency_batch"]), {}).get(row["label"])
    if timed is None:
        shown = row["num_steps"] and results["settings"]["latency_rounds"]
        return (f"{1000 * row['seconds_per_clip']:.1f}", "") if shown else ("-", "")
    return f"{1000 * timed['value']:.1f}", f"{1000 * timed['low']:.1f} to {1000 * timed['high']:.1f}"


def asks_for_looks(results: Results) -> bool:
    """Whether the question is how frames look: of motion students, and of studies that show the watermark."""
    chosen = results["settings"].get("columns") or ()
    return "watermark" in chosen or any(row["group"].startswith("motion") for row in results["rows"])


def markdown_table(results: Results) -> str:
    """Write the README's table, with intervals for what the claims are about, then the claims."""
    look, chosen = asks_for_looks(results), results["settings"].get("columns")
    measures = shown_measures(results, chosen or (LOOK_COLUMNS if look else README_COLUMNS))
    shown = chosen or (LOOK_WITH_INTERVAL if look else WITH_INTERVAL)
    lines = [
        "| " + " | ".join(["sampler", "passes", *(m.label for m in measures), "ms per clip"]) + " |",
        "|---" * (len(measures) + 3) + "|",
    ]
    for row in all_rows(results):
        cells = []
        for measure in measures:
            value, interval = _cell(measure, row)
            cells.append(f"{value} ({interval})" if interval and measure.name in shown else value)
        passes = str(row["passes"]) if row["num_steps"] else "-"
        lines.append("| " + " | ".join([row["label"], passes, *cells, _seconds(results, row)[0]]) + " |")
    lines += [
        "",
        footnote(results),
        "",
        *(f"* **{v['outcome']}**: {_escape(v['text'])}" for v in results["verdicts"]),
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def footnote(results: Results) -> str:
    """Say what the numbers stand on."""
    s = results["settings"]
    device, small = s.get("device", "cpu"), "device" not in s
    with_what = f"{s['threads']} threads" if device == "cpu" else device
    seeds = ", ".join(f"{kind}: {count}" for kind, count in s["students"].items()) or "none"
    timed = (
        f"sampling alone, batch {s['latency_batch']}, median of {s['latency_rounds']} rounds, "
        f"{with_what}, {'samplers in turn' if small else 'one set of networks after the other'}"
    )
    once, twice = "not timed", "; a guided step is two passes" if small else ""
    features = s.get("frechet", "random features, not comparable with FVD")
    frechet = (
        ""
        if results["null"] is None or (asks_for_looks(results) and not s.get("columns"))
        else (f"Frechet: {features}; real clips in the same number score {results['null']:.1f}. ")
    )
    held_out = s.get("captions_are", "captions held out from training")
    return (
        f"{s['num_clips']} clips per sampler, {held_out}, the same noise for all; 95 % "
        f"bootstrap intervals over clips and training seeds (students: {seeds}). The teacher is guided with "
        f"w = {s['guidance_scale']:g}{twice}. {frechet}Milliseconds: "
        f"{timed if s['latency_rounds'] else once}."
    )


def html(results: Results, pictures: Mapping[str, bytes]) -> str:
    """Render the whole report as one page; every image is inside it."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    measures = shown_measures(results)
    heads = [{"label": "sampler", "meaning": ""}, {"label": "steps", "meaning": "jumps from noise to clip"}]
    heads += [{"label": "passes", "meaning": "network passes per clip; a guided teacher's step is two"}]
    heads += [{"label": m.label, "meaning": m.meaning} for m in measures]
    heads += [{"label": "ms per clip", "meaning": "sampling alone, without text and codec"}]
    rows = [{"kind": row["group"], "cells": _cells(results, row, measures)} for row in all_rows(results)]
    images = dict.fromkeys(PICTURES) | {name: _inline(name, data) for name, data in pictures.items()}
    settings = [(name, value) for name, value in results["settings"].items() if name != "lead"]
    return environment.get_template("report.html.j2").render(
        title="Quality against steps",
        lead=results["settings"]["lead"],
        note=footnote(results),
        verdicts=results["verdicts"],
        heads=heads,
        rows=rows,
        images=images,
        skipped=results["skipped"],
        settings=settings,
    )


def _cells(results: Results, row: Mapping[str, Any], measures: Sequence[Measure]) -> list[dict[str, str]]:
    counts = (str(row["num_steps"]), str(row["passes"])) if row["num_steps"] else ("-", "-")
    pairs = [(row["label"], ""), *((count, "") for count in counts)]
    pairs += [*(_cell(m, row) for m in measures), _seconds(results, row)]
    return [{"value": value, "interval": interval} for value, interval in pairs]


def _inline(name: str, data: bytes) -> str:
    kind = Path(PICTURES[name]).suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def update_readme(readme: str | Path, table: str, section: str = "table") -> None:
    """Put the table between the README's markers. Raises InvalidValue unless both are there once."""
    text = Path(readme).read_text(encoding="utf-8")
    begin, end = (f"<!-- {section}:{side} -->" for side in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InvalidValue(str(readme), "no place for the table", f"lines {begin} and {end}, once each")
    new = re.sub(
        f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{table}{end}", text, flags=re.DOTALL
    )
    write_atomically(readme, new.encode())


def publish_pictures(pictures: Mapping[str, bytes], docs: str | Path) -> list[Path]:
    """Copy the pictures for the README. Raises InvalidValue over 1.5 MB: a repository keeps them."""
    total = sum(map(len, pictures.values()))
    if total > DOCS_LIMIT_BYTES:
        raise InvalidValue(
            "pictures", f"{total} bytes", f"at most {DOCS_LIMIT_BYTES}: lower pictures.captions"
        )
    written = [Path(docs) / PICTURES[name] for name in pictures]
    for path, data in zip(written, pictures.values(), strict=True):
        write_atomically(path, data)
    return written
