"""From a config and a setting to results.json and the report."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.artifacts import LatentStore, fingerprint, write_json
from raydistill.config.evaluate import EvaluateConfig
from raydistill.evaluation import intervals, pictures, plots
from raydistill.evaluation.candidates import Lineup, Skipped, is_teacher
from raydistill.evaluation.records import Record, RecordStore
from raydistill.evaluation.report import asks_for_looks, write_report
from raydistill.evaluation.run import (
    Bench,
    Frames,
    Progress,
    Setting,
    code_digest,
    decode,
    latency_calls,
    time_in_turn,
)
from raydistill.evaluation.summary import CONTROL, ROUND_TRIP, Row, Summary, rows_of
from raydistill.evaluation.verdicts import Judgement, Verdict

RESULTS = "results.json"
SHOWN_STEPS = (4, 2)
TIMED_STEPS = 4
IMAGES_IN_CELL = 4


@dataclass(frozen=True)
class Report:
    """What was written."""

    results: dict[str, Any]
    """What results.json holds."""
    pictures: dict[str, bytes]
    """Files by their name in `report.PICTURES`."""
    computed: list[str]
    """Samplers that were not found on disk."""


def build_report(
    config: EvaluateConfig,
    setting: Setting,
    lineup: Lineup,
    progress: Progress = lambda *_: None,
    *,
    decide: Callable[[Mapping[str, Row]], list[Verdict]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Report:
    """Measure the lineup and write results.json, report.html and report/ below config.output.

    `decide` gives verdicts other than the usual ones from the rows by label; `more` goes into the settings,
    of which `columns` names the measures of the table.

    Samplers already measured, by the same code on the same clips, are read back from config.records.
    """
    output = Path(config.output)
    kept = Path(config.records or output / "records")
    bench = Bench(setting, RecordStore(kept), progress)
    records = bench.run(lineup)
    timings = _timings(config, setting, lineup, kept)
    summary = Summary(bench.control, bench.real_features, config.seed, config.num_draws)
    rows = rows_of(summary, lineup.candidates, records)
    reference = [summary.reference(CONTROL, bench.control), summary.reference(ROUND_TRIP, bench.round_trip)]
    everything = rows | {row.label: row for row in reference}
    curves, missing = _curves(config)
    usual = Judgement(everything, lineup.anchor, timings).all
    verdicts = decide(everything) if decide else usual()
    results = {
        "version": 1,
        "settings": _settings(config, setting, lineup) | dict(more or {}),
        "null": everything[CONTROL].figures["frechet"].value,
        "rows": [row.as_dict() for row in rows.values()],
        "reference": [row.as_dict() for row in reference],
        "latency": _latency(timings),
        "verdicts": [{**verdict.as_dict(), "text": verdict.text} for verdict in verdicts],
        "skipped": [vars(one) for one in (*_absent(config, setting), *lineup.skipped, *missing)],
    }
    write_json(output / RESULTS, results)
    drawn = _pictures(config, setting, lineup, records, results) | curves
    write_report(results, drawn, output)
    return Report(results, drawn, bench.computed)


def _timings(
    config: EvaluateConfig, setting: Setting, lineup: Lineup, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Seconds per call by batch and label; read back if the same samplers were timed before."""
    how = config.latency
    if not how.rounds:
        return {}
    samplers = [[one.label, one.identity] for one in lineup.firsts]
    which = [samplers, how.rounds, how.batches, how.threads, platform.node(), code_digest()]
    place = folder / f"latency-{fingerprint([which, dict(setting.identity)])[:16]}.json"
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        twice = [lineup.in_two_passes] if lineup.in_two_passes else []
        few = [one for one in lineup.firsts if one is lineup.anchor or one.num_steps == TIMED_STEPS] + twice
        torch.set_num_threads(how.threads)
        timings = {
            str(batch): time_in_turn(
                latency_calls(few if number else [*lineup.firsts, *twice], setting, batch), how.rounds
            )
            for number, batch in enumerate(how.batches)
        }
        torch.set_num_threads(config.threads)
        write_json(place, timings)
        return timings


def _latency(timings: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Seconds per clip with intervals, by batch and label."""
    return {
        batch: {
            label: intervals.median([s / int(batch) for s in seconds]).estimate().as_dict()
            for label, seconds in timed.items()
        }
        for batch, timed in timings.items()
    }


def _absent(config: EvaluateConfig, setting: Setting) -> list[Skipped]:
    out = [
        Skipped(f"{label} in the strips", f"no {folder}")
        for label, folder in config.pictures.beside.items()
        if not Path(folder).is_dir()
    ]
    if setting.judge is None:
        without = f"no judge at {config.judge}: direction and speed come from the path alone"
        out.append(Skipped("attributes", without))
    return out


def _settings(config: EvaluateConfig, setting: Setting, lineup: Lineup) -> dict[str, Any]:
    students = {
        kind: len({one.training_seed for one in lineup.candidates if one.group == kind})
        for kind in config.students
    }
    captions = setting.asked.captions
    return {
        "lead": (
            f"{len(lineup.candidates)} samplers on {len(set(captions))} captions that no training saw, "
            f"{setting.num_clips} clips each."
        ),
        "num_clips": setting.num_clips,
        "captions": f"{len(set(captions))} different, digest {fingerprint(list(captions))[:16]}",
        "reference_clips": len(setting.real),
        "seed": config.seed,
        "guidance_scale": config.guidance_scale,
        "students": students,
        "threads": config.latency.threads,
        "latency_batch": config.latency.batches[0],
        "latency_rounds": config.latency.rounds,
        "num_draws": config.num_draws,
        "weights": {one.label: dict(one.weights) for one in lineup.firsts},
        "setting": dict(setting.identity),
        "code": code_digest()[:16],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
    }


def _curves(config: EvaluateConfig) -> tuple[dict[str, bytes], list[Skipped]]:
    """Picture of the loss curves, and runs whose metrics are not there."""
    runs, missing = {}, []
    for name, path in config.metrics.items():
        if not Path(path).is_file():
            missing.append(Skipped(f"loss curves of {name}", f"no {path}"))
        elif lines := plots.read_metrics(path):
            runs[name] = lines
    return ({"losses": plots.draw_losses(runs)} if runs else {}), missing


def _pictures(
    config: EvaluateConfig,
    setting: Setting,
    lineup: Lineup,
    records: Mapping[str, Record],
    results: Mapping[str, Any],
) -> dict[str, bytes]:
    """Draw the first clips of the rows worth seeing: never a choice of good ones."""
    count = min(max(config.pictures.captions, config.pictures.strip_captions), setting.num_clips)
    captions = setting.asked.captions[:count]
    clips: dict[str, Frames] = {CONTROL: setting.control[:count]}
    for one in lineup.firsts:
        shown = one in lineup.anchors.values() or (one.num_steps in SHOWN_STEPS and "+" not in one.label)
        if shown:
            clips[one.label] = decode(setting.codec, records[one.name].latents[:count])
    strips = min(config.pictures.strip_captions, count)
    beside = _beside(config, setting, strips)
    sizes = range(min(config.pictures.captions, count), 0, -1)
    gif = pictures.fit_under(config.pictures.limit_kib * 1024, partial(_first_clips, clips, captions), sizes)
    drawn = {
        "strips": pictures.draw_strips({k: v[:strips] for k, v in clips.items()} | beside, captions[:strips]),
        "clips": gif,
    }
    return drawn | ({"quality": _quality(results)} if results["rows"] else {})


def _beside(config: EvaluateConfig, setting: Setting, count: int) -> dict[str, Frames]:
    """What was trained on, decoded: the first clips, or so many images that each cell is filled."""
    out = dict[str, Frames]()
    for label, folder in config.pictures.beside.items():
        if not Path(folder).is_dir():
            continue  # told among what is skipped
        store = LatentStore(folder)
        store.require_codec(setting.identity["codec"])
        images = store.row(0).latents.shape[1] == 1
        most = min(len(store), count * (IMAGES_IN_CELL if images else 1))
        frames = decode(setting.codec, np.stack([row.latents for row in store.rows(list(range(most)))]))
        filled = len(frames) // IMAGES_IN_CELL * IMAGES_IN_CELL
        out[label] = frames[:filled].reshape(-1, IMAGES_IN_CELL, *frames.shape[2:]) if images else frames
    return out


def _quality(results: Mapping[str, Any]) -> bytes:
    """Quality against steps; of a study of one number of steps, which has no curves, all that it asks for."""
    rows, columns = results["rows"], results["settings"].get("columns")
    steps = {row["num_steps"] for row in rows if not is_teacher(row["group"])}
    if columns and len(steps) == 1:
        real = {name: one["value"] for name, one in results["reference"][0]["figures"].items()}
        return plots.draw_figures(rows, columns, real)
    return plots.draw_quality(rows, {"frechet": results["null"]}, looks=asks_for_looks(results))


def _first_clips(clips: Mapping[str, Frames], captions: Sequence[str], count: int) -> bytes:
    return pictures.draw_gif({label: frames[:count] for label, frames in clips.items()}, captions[:count])
