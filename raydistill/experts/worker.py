"""What one training process does: build its stage, take it up where it stood, run the loop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydistill.artifacts import Manifest, fingerprint
from raydistill.config.distill import DistillConfig
from raydistill.config.load import dump
from raydistill.experts import checkpoint
from raydistill.experts.checkpoint import AVERAGES, STUDENT
from raydistill.experts.engine_json import deepspeed_config
from raydistill.experts.frozen import Cutter, write
from raydistill.experts.launch import Worker
from raydistill.experts.loop import distill
from raydistill.experts.parts import KINDS, Parts
from raydistill.experts.stages import Given, Stage, build_stage, build_student
from raydistill.experts.tracking import Tracker
from raydistill.models.teacher import Teacher, load_frozen, load_schedule
from raydistill.types import Batch

SETTINGS = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every worker of a run is told; plain values and functions, so that it can travel."""

    config: DistillConfig
    batches: Callable[[Worker, int], Iterator[Batch]]
    """(worker, micro batch) -> this worker's micro-batches from worker.start_step on."""
    example: tuple[Tensor, Tensor]
    """Latents and text of one sample, for shapes."""
    semantic: Path | None = None
    """Last checkpoint of the semantic stage, for the detail stage."""
    caption_means: tuple[Tensor, Tensor] | None = None
    """Mean pooled caption of clips and of images, for the image critic."""
    null_text: Tensor | None = None
    """The empty caption's embedding, (l, d); None: that of word vectors."""


NOT_SHAPING = (
    *(
        "output",
        "data",
        "teacher",
        "codec",
        "images",
        "scale",
        "plan",
        "tracking",
        "sampling",
        "save_every",
        "keep",
    ),
    *("report_every", "resume", "engine"),
)
"""Fields that change no number of a stage, or that stand in its settings by their contents' digest."""


def _before(stage: str) -> tuple[str, ...]:
    """Stages whose result a stage starts from."""
    return ("semantic",) if stage == "detail" else ()


def settings_of(
    config: DistillConfig, stage: str, digests: Mapping[str, str], semantic: Path | None = None
) -> dict[str, Any]:
    """Return the settings that shape a stage's numbers; a checkpoint made with others is refused.

    Where a run lies, how it is watched, on how many workers it runs and in how many parts each takes a batch
    are not among them. The detail stage is also bound to the very semantic expert that it began with.
    """
    values = asdict(config)
    for name in (*NOT_SHAPING, *({"semantic", "detail", "motion"} - {stage, *_before(stage)})):
        del values[name]
    for name in (stage, *_before(stage)):
        del values[name]["micro_batch"], values[name]["appearance"]["features"]
    del values["mix"]["trajectories"]
    engine = {"precision": config.engine.precision, "engine_extra": config.engine.extra}
    return {
        **values,
        **engine,
        **digests,
        **({"semantic_expert": result_digest(semantic)} if semantic else {}),
    }


def result_digest(folder: Path) -> str:
    """Fingerprint of the student's weights and averages in a checkpoint, from its manifest."""
    files = Manifest.read(folder).files
    return fingerprint(
        {n: f["sha256"] for n, f in files.items() if n.startswith((f"{AVERAGES}/", f"{STUDENT}/"))}
    )


def train(worker: Worker) -> None:
    """Train `worker.stage` to its end; given to `launch`, which calls it in every worker process."""
    run: Run = worker.config
    config = run.config
    stage = _build(run, worker)
    if worker.resume_from is not None:
        checkpoint.load(worker.resume_from, worker.state, parts=stage.parts())
    if worker.rank == 0:
        dump(config, worker.run_dir / SETTINGS)
    tracker = Tracker(config.tracking, worker.run_dir, asdict(config)) if worker.rank == 0 else None

    def report(step: int, figures: dict[str, float]) -> None:
        if tracker is not None:
            tracker.write(stage.name, step, figures)

    def save(step: int) -> None:
        reached = replace(worker.state, step=step)
        checkpoint.save(worker.run_dir, reached, parts=stage.parts(), keep=config.keep)

    batches = on_device(run.batches(worker, stage.config.micro_batch), worker)
    every = {"report_every": config.report_every, "save_every": config.save_every}
    try:
        distill(stage, batches, **every, report=report, save=save)
    finally:
        if tracker is not None:
            tracker.close()
        stage.close()


def _build(run: Run, worker: Worker) -> Stage:
    """Load the networks of `worker.stage` onto the worker's device and give them their roles."""
    config, where = run.config, (run.config.teacher, worker.stage, run.config.guidance_scale)
    # Tensor by tensor: nothing of it is held twice, nor in the machine's memory beside the device's.
    dtype, device, take = torch.float32, torch.device(worker.device), dict[str, Any]()
    if config.student_in_shards:
        # As its engine would cast it, masters included, and by the engine's own settings.
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else dtype
        optimizer = config.stage(worker.stage).optimizer
        json = deepspeed_config(config.engine, optimizer, accumulation=1, num_weights=1, device=device)
        take = {"take": Cutter(json, device)}
    network = load_frozen(*where, dtype=dtype, device=device, **take)
    semantic = None
    if run.semantic:
        # Of two whole networks the second has nothing of the first.
        whole = config.experts == "dual_full"
        semantic = network if whole else load_result(config, run.semantic, network)
    latents, text = (x.to(worker.device) for x in run.example)
    null = run.null_text.to(worker.device) if run.null_text is not None else None
    schedule, load = load_schedule(config.teacher), partial(load_frozen, *where)
    given = Given(network, latents, text, semantic, schedule, run.caption_means, null, load=load)
    return build_stage(config, worker.stage, given)


def on_device(batches: Iterator[Batch], worker: Worker) -> Iterator[Batch]:
    """Move each batch's tensors to the worker's device; indices stay, they key random numbers."""
    for batch in batches:
        images = batch.images
        yield replace(
            batch,
            latents=batch.latents.to(worker.device),
            text=batch.text.to(worker.device),
            x_r=batch.x_r.to(worker.device) if batch.x_r is not None else None,
            images=replace(
                images, latents=images.latents.to(worker.device), text=images.text.to(worker.device)
            )
            if images
            else None,
        )


def load_result(
    config: DistillConfig, folder: Path, network: Teacher, semantic: Teacher | None = None
) -> Teacher:
    """Rebuild a stage's result, the averaged student, from a checkpoint; frozen.

    Without `semantic` it is the semantic (or single) expert; with it, the detail expert over it. `network`,
    the teacher's, becomes the result, or is shared by it if that is a LoRA.
    """
    return _with_weights(
        build_student(config, network, semantic, keep=False), folder, averaged=bool(config.average_decay)
    )


def _with_weights(student: Teacher, folder: Path, *, averaged: bool) -> Teacher:
    """Give a student its trained weights, read one at a time."""
    parts, kind = (Parts(folder / AVERAGES), "average") if averaged else (Parts(folder / STUDENT), KINDS[0])
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            write(parameter, parts.get(kind, name))
    return student.requires_grad_(False).eval()
