"""What becomes of checkpoints: a student's folder, at the end of a run or from any of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from raydistill.artifacts import LatentStore
from raydistill.config.distill import DistillConfig
from raydistill.errors import ArtifactError, IncompatibleCheckpoint, InvalidValue, MissingArtifact
from raydistill.experts import checkpoint
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.stages import build_segment
from raydistill.experts.worker import NOT_SHAPING, load_result, result_digest, settings_of
from raydistill.models.folders import built_beside, teacher_digest
from raydistill.models.teacher import load_teacher, read_schedule
from raydistill.models.text import null_of, text_identity
from raydistill.sampler import SamplingPlan, build_plan, plan_lcm, plan_times, with_tail
from raydistill.student import Card, save_student

BESIDE = ("precision", "engine_extra", "semantic_expert")
"""Of a checkpoint's settings, those that are neither fields of the config nor digests of inputs."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a student's card says of the data that it was trained on."""

    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    null_text: Tensor
    """The empty caption's embedding, (l, d)."""
    encoder: Mapping[str, Any]
    """Identity of what embedded the captions."""

    @staticmethod
    def of(store: LatentStore) -> "Sample":
        """Read it from prepared latents. Raises what `null_of` raises."""
        row = store.row(0)
        shapes = {"latent_shape": row.latents.shape, "text_shape": row.text.shape}
        return Sample(**shapes, null_text=null_of(store), encoder=text_identity(store))


def plans_of(config: DistillConfig) -> dict[str, SamplingPlan]:
    """Return the sampling plans that are stored with the student, by name."""
    segment, sampling = build_segment(config, config.stages[0]), config.sampling
    grid, path = segment.grid, sampling.path
    boundary = segment.lower if config.is_dual else None
    if config.experts == "motion":  # at LCM's times, as MCM's students are sampled
        plans = {str(n): plan_lcm(n, grid, path) for n in sampling.num_steps}
    else:
        plans = {str(n): build_plan(n, boundary, grid, path) for n in sampling.num_steps}
    if boundary is not None:
        plans |= {f"{n}+tail": with_tail(n, boundary, grid, path) for n in sampling.semantic_tail}
    own = {name: plan_times(tuple(t), boundary, grid.last, path) for name, t in sampling.times.items()}
    return plans | own


def card_of(config: DistillConfig, sample: Sample, digests: Mapping[str, Any], *, alone: bool) -> Card:
    """Return a student's card; `alone`: it is the semantic expert of two, which its teacher finishes."""
    segment, first_lora = build_segment(config, config.stages[0]), config.semantic
    lora = None if alone else {"dual": config.detail, "motion": config.motion}.get(config.experts)
    return Card(
        kind="single" if alone else config.experts,
        boundary=segment.lower if config.is_dual else None,
        grid=segment.grid,
        guidance_scale=config.guidance_scale,
        guidance_scale_2=config.guidance_scale_2 or None,
        guidance_range=segment.guidance,
        schedule=read_schedule(config.teacher),
        latent_shape=sample.latent_shape,
        text_shape=sample.text_shape,
        lora=(lora.lora_rank, lora.lora_alpha) if lora else None,
        semantic_lora=(first_lora.lora_rank, first_lora.lora_alpha) if first_lora.lora_rank else None,
        sources={**digests, "seed": config.seed, "text": sample.encoder},
    )


def write_student(
    config: DistillConfig,
    folder: Path,
    sample: Sample,
    digests: Mapping[str, Any],
    checkpoints: tuple[Path, ...],
) -> None:
    """Write a student from checkpoints of its stages, in their order.

    One network after the other is read from the teacher's folder and given its trained weights in place. Of
    two experts the first may come alone: then plans are stored that do without the second, such as 2+tail.
    """
    alone = len(checkpoints) < len(config.stages)
    plans = plans_of(config)
    if alone:
        plans = {n: p for n, p in plans.items() if all(jump.expert != "detail" for jump in p.jumps)}
    if not plans:
        expected = "at least one: without the detail expert the teacher must finish what this one begins"
        raise InvalidValue("sampling.semantic_tail", config.sampling.semantic_tail, expected)
    first = load_teacher(config.teacher, guidance_scale=config.guidance_scale)
    first, second = load_result(config, checkpoints[0], first), None
    if checkpoints[1:]:
        whole = config.experts == "dual_full"
        other = load_teacher(config.teacher, "detail", config.guidance_scale) if whole else first
        second = load_result(config, checkpoints[1], other, first)
    card = card_of(config, sample, digests, alone=alone)
    save_student(folder, card, first, second, plans, sample.null_text)


def consolidate(folder: Path, config: DistillConfig, store: LatentStore, output: Path) -> TrainState:
    """Write the student that a run's checkpoint holds; neither Ray nor DeepSpeed nor a GPU is needed.

    What was averaged is taken as the average. Raises MissingArtifact or CorruptArtifact for what is no whole
    checkpoint, and where the semantic expert of a detail checkpoint is gone; IncompatibleCheckpoint where
    settings, teacher or data are not those of the run.
    """
    checkpoint.verify(folder)
    state = checkpoint.read_state(folder)
    if state.stage not in config.stages:
        raise IncompatibleCheckpoint(f"{folder} is of a stage that experts={config.experts} has not")
    known = {field.name for field in fields(DistillConfig)} - set(NOT_SHAPING)
    recorded = {n: x for n, x in state.settings.items() if n not in known and n not in BESIDE}
    semantic = _semantic_of(folder, state) if state.stage == "detail" else None
    found = recorded | {"teacher": teacher_digest(config.teacher), "latents": store.fingerprint}
    settings = settings_of(config, state.stage, found, semantic)
    expected = TrainState(stage=state.stage, step=0, settings=settings, plan=state.plan)
    checkpoint.require_same_run(folder, expected)
    checkpoints = (semantic, folder) if semantic else (folder,)
    try:
        with built_beside(output) as beside:
            write_student(config, beside, Sample.of(store), recorded, checkpoints)
    except (FileNotFoundError, IncompatibleCheckpoint) as gone:
        if folder.is_dir():
            raise
        raise MissingArtifact(f"{folder} is gone: its run has newer ones now, take one of them") from gone
    return state


def _semantic_of(folder: Path, state: TrainState) -> Path:
    """Find the checkpoint of the semantic expert that a detail expert stands on, beside its own."""
    for other in sorted(folder.parent.glob("semantic-step-*"), reverse=True):
        try:
            found = result_digest(other)
        except ArtifactError:  # a torn one, which is not it
            continue
        if found == state.settings["semantic_expert"]:
            checkpoint.verify(other)
            return other
    raise MissingArtifact(
        f"{folder.parent} has no checkpoint of the semantic expert that {folder.name} stands on: it is the "
        "semantic stage's last, copy it beside"
    )
