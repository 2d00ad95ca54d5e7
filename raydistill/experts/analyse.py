"""Where on the path a student struggles: DCM's figures 2 and 10 for any teacher, and a boundary from them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill import draws
from raydistill.config.distill import DistillConfig, EngineConfig, MixConfig, ScaleConfig
from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.function import jump
from raydistill.consistency.schedule import Schedule, TimeGrid
from raydistill.errors import InvalidValue
from raydistill.experts.loop import distill
from raydistill.experts.semantic import Segment, consistency_pair, consistency_terms
from raydistill.experts.stages import Given, Stage, build_stage
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import load_schedule, load_teacher
from raydistill.types import Batch, Indices, Times

PROBED_NODES = 10
PROBES = 4


@dataclass(frozen=True)
class _AtNode(Segment):
    """A segment whose samples all start at one node of the grid."""

    node: int = 0

    def times(self, index: Indices, purpose: str = "time") -> tuple[Times, Times, Times]:
        """The node's interval for every sample."""
        t, r = self.grid.interval(torch.full_like(index, self.node))
        return t, r, torch.full_like(t, self.lower)


def change_of_x0(
    teacher: VelocityField, schedule: Schedule, grid: TimeGrid, noise: Tensor, text: Tensor
) -> tuple[list[float], list[float]]:
    """Mean |x0_i - x0_(i-1)| of the teacher's successive predictions (DCM, fig. 10), and the times t_i."""
    times, changes, before, x = grid.times.tolist(), [], None, noise
    with torch.no_grad():
        for t, s in pairwise(times):
            at, to = (torch.full((len(x),), u, dtype=torch.float64) for u in (t, s))
            prediction = teacher(x, at, text)
            x0 = schedule.to_x0(prediction, x, at)
            if before is not None:
                changes.append(float((x0 - before).abs().mean()))
            before, x = x0, jump(schedule, prediction, x, at, to)
    return times[1:-1], changes


def propose_boundary(grid: TimeGrid, change_times: list[float], change: list[float]) -> float:
    """Return the node that best cuts log(change) into two levels, by least squares.

    DCM reads its boundary off the same curve by eye: where successive predictions stop moving much. Each side
    must hold a tenth of the nodes. Raises InvalidValue for a grid too coarse to be cut.
    """
    if len(change) < 3:
        raise InvalidValue("grid.num_intervals", grid.num_intervals, "at least 4, to look for a boundary")
    logs = np.log(np.maximum(change, 1e-12))
    least = max(1, len(logs) // 10)
    cuts = range(least, len(logs) - least)
    spread = [logs[:k].var() * k + logs[k:].var() * (len(logs) - k) for k in cuts]
    return grid.snap(change_times[cuts[int(np.argmin(spread))]])


def probe(
    stage: Stage, batches: Sequence[Batch], nodes: list[int], objective: ObjectiveConfig
) -> tuple[list[float], list[float]]:
    """Consistency loss and its gradient's norm at each node, on the same samples and noise (DCM, fig. 2).

    The batches are of one size; what is given is of all of them together.
    """
    losses, norms = [], []
    weights = [p for p in stage.student.parameters() if p.requires_grad]
    segment = stage.segment
    for node in nodes:
        here = _AtNode(**vars(segment), node=node)
        loss, total = 0.0, [torch.zeros_like(p, dtype=torch.float32) for p in weights]
        for batch in batches:
            term = consistency_terms(consistency_pair(stage.nets, here, batch), objective)["consistency"]
            mean = term.value.mean() / len(batches)
            loss += float(mean.detach())
            gradients = torch.autograd.grad(mean, weights, allow_unused=True)
            for added, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    added.add_(gradient)
        losses.append(loss)
        norms.append(float(torch.stack([g.norm() for g in total]).norm()))
    return losses, norms


def analyse(
    config: DistillConfig,
    read: Callable[[int], tuple[Tensor, Tensor]],
    num_rows: int,
    report: Callable[[str], None],
    null_text: Tensor | None = None,
) -> dict[str, Any]:
    """Train one plain student over the whole range, `semantic.num_steps` / 4 steps; watch it by noise level.

    `read(i)` gives latents and text of row i, `null_text` is the empty caption's embedding (see `Given`).
    Runs in this process, on its GPU if scale.use_gpu says so.
    Returns plain lists, see `evaluation.analysis_plots.draw_analysis`. Raises InvalidValue for a grid too
    coarse, or where there is no GPU.
    """
    device = _device(config)
    single = _alone(config)
    objective = replace(single.semantic.objective, temporal_coherence=0.0)
    rows = _Rows(read, num_rows, single.semantic.micro_batch, device)
    fixed = list(islice(rows.batches(), config.semantic.global_batch // single.semantic.micro_batch))
    teacher = load_teacher(config.teacher, guidance_scale=config.guidance_scale).to(device)
    null = null_text.to(device) if null_text is not None else None
    schedule = load_schedule(config.teacher)
    given = Given(teacher, fixed[0].latents[:1], fixed[0].text[:1], schedule=schedule, null_text=null)
    stage = build_stage(single, "semantic", given)
    grid = stage.segment.grid
    nodes = sorted({round(i * (grid.num_intervals - 1) / (PROBED_NODES - 1)) for i in range(PROBED_NODES)})
    change_times, change = _mean_change(stage, fixed, config.seed)
    boundary = propose_boundary(grid, change_times, change)  # before training, as it may refuse the grid
    steps, losses, norms = [], [], []
    num_steps = single.semantic.num_steps

    def look(step: int) -> None:
        loss, norm = probe(stage, fixed, nodes, objective)
        steps.append(step)
        losses.append(loss)
        norms.append(norm)
        report(f"analysis: step {step} of {num_steps}")

    look(0)
    every = {"report_every": num_steps, "save_every": -(-num_steps // PROBES)}
    distill(stage, rows.batches(), **every, report=lambda *_: None, save=look)
    result: dict[str, Any] = {"times": [float(grid.times[n]) for n in nodes], "steps": steps, "loss": losses}
    result |= {"gradient": norms, "change_times": change_times, "change": change, "boundary": boundary}
    title = f"{config.teacher}, {config.semantic.global_batch} samples"
    return result | {"in_use": config.boundary, "title": title}


def _alone(config: DistillConfig) -> DistillConfig:
    """Return the settings of a short run of one plain student in this process."""
    num_steps = max(PROBES, config.semantic.num_steps // 4)
    warmup = min(config.semantic.optimizer.warmup_steps, num_steps)
    optimizer = replace(config.semantic.optimizer, warmup_steps=warmup)
    objective = replace(config.semantic.objective, motion=0.0, appearance=0.0, consistency=1.0)
    precision, less_memory = config.engine.precision, config.engine.activation_checkpointing
    return replace(
        config,
        experts="single",
        images="",
        mix=MixConfig(),
        semantic=replace(
            config.semantic, num_steps=num_steps, optimizer=optimizer, objective=objective, lora_rank=0
        ),
        engine=EngineConfig(backend="torch", precision=precision, activation_checkpointing=less_memory),
        scale=ScaleConfig(num_workers=1),
    )


def _device(config: DistillConfig) -> torch.device:
    if config.scale.use_gpu and not torch.cuda.is_available():
        raise InvalidValue("scale.use_gpu", True, "needs a GPU where --analyse runs; false takes the CPU")
    return torch.device("cuda" if config.scale.use_gpu else "cpu")


def _mean_change(stage: Stage, batches: Sequence[Batch], seed: int) -> tuple[list[float], list[float]]:
    """Return `change_of_x0` over several batches of one size."""
    times, changes = [], []
    for batch in batches:
        noise = draws.noise(seed, batch.index, "analysis", tuple(batch.latents.shape[1:])).to(batch.latents)
        times, change = change_of_x0(
            stage.nets.teacher, stage.segment.schedule, stage.segment.grid, noise, batch.text
        )
        changes.append(change)
    return times, np.mean(changes, axis=0).tolist()


@dataclass(frozen=True)
class _Rows:
    """The data in order, again and again, in batches on a device."""

    read: Callable[[int], tuple[Tensor, Tensor]]
    num_rows: int
    size: int
    device: torch.device

    def batches(self) -> Iterator[Batch]:
        for start in count(0, self.size):
            index = range(start, start + self.size)
            pairs = zip(*(self.read(i % self.num_rows) for i in index), strict=True)
            latents, text = (torch.stack(values).to(self.device) for values in pairs)
            yield Batch(torch.tensor(list(index)), latents, text)
