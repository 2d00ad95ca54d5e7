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
from raydistill.evaluation.candidates import TEACHER, Candidate, Lineup, Skipped, is_teacher
from raydistill.evaluation.ground import Frames, Ground
from raydistill.evaluation.records import Record, RecordStore
from raydistill.evaluation.report import asks_for_looks, write_report
from raydistill.evaluation.run import (
    Bench,
    Progress,
    Setting,
    code_digest,
    decode_call,
    latency_calls,
    time_in_turn,
)
from raydistill.evaluation.summary import Row, Summary, rows_of
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
    setting: Ground,
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
    meter = setting.meter
    real = meter.references(bench.anchors.get(TEACHER))
    control, distance = next(iter(real.values())), meter.distance
    summary = Summary(control, meter.real_features, config.seed, config.num_draws, distance)
    rows = rows_of(summary, lineup.candidates, records)
    reference = [summary.reference(label, record) for label, record in real.items()]
    everything = rows | {row.label: row for row in reference}
    curves, missing = _curves(config)
    judgement = Judgement(everything, lineup.anchor, timings, distance or "frechet")
    usual = judgement.of_real if config.data else judgement.all
    verdicts = decide(everything) if decide else usual()
    results = {
        "version": 1,
        "settings": _settings(config, setting, lineup) | dict(setting.notes) | dict(more or {}),
        "null": reference[0].figures[distance].value if distance else None,
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
    config: EvaluateConfig, setting: Ground, lineup: Lineup, folder: Path
) -> dict[str, dict[str, list[float]]]:
    """Seconds per call by batch and label; read back if the same samplers were timed before."""
    how = config.latency
    if not how.rounds:
        return {}
    samplers = [[one.label, one.identity] for one in lineup.firsts]
    machine = (platform.node(), gpu_of(config.device))
    which = [samplers, how.rounds, how.batches, how.threads, *machine, code_digest()]
    place = folder / f"latency-{fingerprint([which, dict(setting.identity)])[:16]}.json"
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        twice = [lineup.in_two_passes] if lineup.in_two_passes else []
        few = [one for one in lineup.firsts if one is lineup.anchor or one.num_steps == TIMED_STEPS] + twice
        torch.set_num_threads(how.threads)
        timings = {
            str(batch): _timed(few if number else [*lineup.firsts, *twice], setting, batch, how.rounds)
            for number, batch in enumerate(how.batches)
        }
        torch.set_num_threads(config.threads)
        write_json(place, timings)
        return timings


def gpu_of(device: str) -> str:
    """Name of a GPU; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def _timed(
    candidates: Sequence[Candidate], setting: Ground, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call by label, in turn among all that stay loaded; first of decoding, beside the first."""
    out, more = dict[str, list[float]](), decode_call(setting, batch)
    for needs in dict.fromkeys(one.needs for one in candidates):
        same = [one for one in candidates if one.needs == needs]
        out |= time_in_turn(latency_calls(same, setting, batch) | more, rounds)
        more = {}
    return out


def _latency(timings: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Seconds per clip with intervals, by batch and label."""
    return {
        batch: {
            label: intervals.median([s / int(batch) for s in seconds]).estimate().as_dict()
            for label, seconds in timed.items()
        }
        for batch, timed in timings.items()
    }


def _absent(config: EvaluateConfig, setting: Ground) -> list[Skipped]:
    out = [
        Skipped(f"{label} in the strips", f"no {folder}")
        for label, folder in config.pictures.beside.items()
        if not Path(folder).is_dir()
    ]
    if isinstance(setting, Setting) and setting.judge is None:
        without = f"no judge at {config.judge}: direction and speed come from the path alone"
        out.append(Skipped("attributes", without))
    return out


def _settings(config: EvaluateConfig, setting: Ground, lineup: Lineup) -> dict[str, Any]:
    students = {
        kind: len({one.training_seed for one in lineup.candidates if one.group == kind})
        for kind in config.students
    }
    captions = setting.captions
    return {
        "lead": (
            f"{len(lineup.candidates)} samplers on {len(set(captions))} captions that no training saw, "
            f"{len(captions)} clips each."
        ),
        "num_clips": len(captions),
        "captions": f"{len(set(captions))} different, digest {fingerprint(list(captions))[:16]}",
        "reference_clips": setting.num_reference,
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
        "machine": ", ".join(filter(None, (platform.machine(), platform.system(), gpu_of(config.device)))),
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
    setting: Ground,
    lineup: Lineup,
    records: Mapping[str, Record],
    results: Mapping[str, Any],
) -> dict[str, bytes]:
    """Draw the first clips of the rows worth seeing: never a choice of good ones."""
    captions = setting.captions
    count = min(max(config.pictures.captions, config.pictures.strip_captions), len(captions))
    captions, (label, real) = captions[:count], setting.real_frames(count)
    clips: dict[str, Frames] = {label: pictures.reduced(real)}
    for one in lineup.firsts:
        shown = one in lineup.anchors.values() or (one.num_steps in SHOWN_STEPS and "+" not in one.label)
        if shown:
            clips[one.label] = pictures.reduced(setting.decode(records[one.name].latents[:count]))
    strips = min(config.pictures.strip_captions, count)
    beside = _beside(config, setting, strips)
    sizes = range(min(config.pictures.captions, count), 0, -1)
    gif = pictures.fit_under(config.pictures.limit_kib * 1024, partial(_first_clips, clips, captions), sizes)
    drawn = {
        "strips": pictures.draw_strips({k: v[:strips] for k, v in clips.items()} | beside, captions[:strips]),
        "clips": gif,
    }
    return drawn | ({"quality": _quality(results)} if results["rows"] else {})


def _beside(config: EvaluateConfig, setting: Ground, count: int) -> dict[str, Frames]:
    """What was trained on, decoded: the first clips, or so many images that each cell is filled."""
    out = dict[str, Frames]()
    for label, folder in config.pictures.beside.items():
        if not Path(folder).is_dir():
            continue  # told among what is skipped
        store = LatentStore(folder)
        store.require_codec(setting.identity["codec"])
        images = store.row(0).latents.shape[1] == 1
        most = min(len(store), count * (IMAGES_IN_CELL if images else 1))
        latents = np.stack([row.latents for row in store.rows(range(most))])
        frames = pictures.reduced(setting.decode(latents))
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
    if "data" in results["settings"]:
        null = {plots.REAL[1][0]: results["null"]} if results["null"] is not None else {}
        return plots.draw_quality(rows, null, panels=plots.REAL)
    panels = plots.LOOKS if asks_for_looks(results) else plots.PANELS
    return plots.draw_quality(rows, {"frechet": results["null"]}, panels=panels)


def _first_clips(clips: Mapping[str, Frames], captions: Sequence[str], count: int) -> bytes:
    return pictures.draw_gif({label: frames[:count] for label, frames in clips.items()}, captions[:count])
