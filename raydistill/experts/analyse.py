"""Where on the path a student struggles: DCM's figures 2 and 10 for any teacher, and a boundary from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill import draws
from raydistill.config.distill import DistillConfig, EngineConfig, ObjectiveConfig, ScaleConfig
from raydistill.consistency.schedule import TimeGrid
from raydistill.experts.loop import distill
from raydistill.experts.semantic import Segment, consistency_pair, consistency_terms
from raydistill.experts.stages import Stage, build_stage
from raydistill.models.protocols import VelocityField
from raydistill.models.wan import load_teacher
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
    teacher: VelocityField, grid: TimeGrid, noise: Tensor, text: Tensor
) -> tuple[list[float], list[float]]:
    """Mean |x0_i - x0_(i-1)| of the teacher's successive predictions (DCM, fig. 10), and the times t_i."""
    times, changes, before, x = grid.times.tolist(), [], None, noise
    with torch.no_grad():
        for t, s in pairwise(times):
            at = torch.full((len(x),), t, dtype=torch.float64)
            velocity = teacher(x, at, text)
            x0 = x - t * velocity
            if before is not None:
                changes.append(float((x0 - before).abs().mean()))
            before, x = x0, x + (s - t) * velocity
    return times[1:-1], changes


def propose_boundary(grid: TimeGrid, change_times: list[float], change: list[float]) -> float:
    """Return the node that best cuts log(change) into two levels, by least squares.

    DCM reads its boundary off the same curve by eye: where successive predictions stop moving much. Each side
    must hold a tenth of the nodes.
    """
    logs = np.log(np.maximum(change, 1e-12))
    least = max(1, len(logs) // 10)
    cuts = range(least, len(logs) - least)
    spread = [logs[:k].var() * k + logs[k:].var() * (len(logs) - k) for k in cuts]
    return grid.snap(change_times[cuts[int(np.argmin(spread))]])


def probe(
    stage: Stage, batch: Batch, nodes: list[int], objective: ObjectiveConfig
) -> tuple[list[float], list[float]]:
    """Consistency loss and its gradient's norm at each node, on the same samples and noise (DCM, fig. 2)."""
    losses, norms = [], []
    weights = [p for p in stage.student.parameters() if p.requires_grad]
    segment = stage.segment
    for node in nodes:
        here = _AtNode(segment.schedule, segment.grid, segment.upper, segment.lower, segment.seed, node)
        term = consistency_terms(consistency_pair(stage.nets, here, batch), objective)["consistency"]
        gradients = torch.autograd.grad(term.value.mean(), weights, allow_unused=True)
        losses.append(float(term.value.detach().mean()))
        norms.append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))
    return losses, norms


def analyse(
    config: DistillConfig,
    read: Callable[[int], tuple[Tensor, Tensor]],
    num_rows: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train one plain student over the whole range, `semantic.num_steps` / 4 steps; watch it by noise level.

    `read(i)` gives latents and text of row i. Returns plain lists, see
    `evaluation.analysis_plots.draw_analysis`.
    """
    num_steps = max(PROBES, config.semantic.num_steps // 4)
    semantic = replace(config.semantic, num_steps=num_steps, micro_batch=config.semantic.global_batch)
    single = replace(
        config,
        experts="single",
        semantic=semantic,
        engine=EngineConfig(backend="torch"),
        scale=ScaleConfig(num_workers=1),
    )
    fixed = _batch(read, num_rows, range(config.semantic.global_batch))
    teacher = load_teacher(config.teacher)
    stage = build_stage(single, "semantic", teacher, None, fixed.latents[:1], fixed.text[:1])
    grid = stage.segment.grid
    nodes = [round(i * (grid.num_intervals - 1) / (PROBED_NODES - 1)) for i in range(PROBED_NODES)]
    objective = replace(semantic.objective, temporal_coherence=0.0)
    noise = draws.noise(config.seed, fixed.index, "analysis", tuple(fixed.latents.shape[1:]))
    change_times, change = change_of_x0(stage.nets.teacher, grid, noise, fixed.text)
    every = max(1, num_steps // PROBES)
    steps, losses, norms = [], [], []

    def look(step: int) -> None:
        loss, norm = probe(stage, fixed, nodes, objective)
        steps.append(step)
        losses.append(loss)
        norms.append(norm)
        report(f"analysis: step {step} of {num_steps}")

    look(0)
    batches = _batches(read, num_rows, config.semantic.global_batch)
    distill(stage, batches, report_every=num_steps, save_every=every, report=lambda *_: None, save=look)
    boundary = propose_boundary(grid, change_times, change)
    result: dict[str, Any] = {"times": [float(grid.times[n]) for n in nodes], "steps": steps, "loss": losses}
    result |= {"gradient": norms, "change_times": change_times, "change": change, "boundary": boundary}
    return result | {"in_use": config.boundary, "title": f"{config.teacher}, {len(fixed.index)} samples"}


def _batch(read: Callable[[int], tuple[Tensor, Tensor]], num_rows: int, indices: range) -> Batch:
    rows = [read(i % num_rows) for i in indices]
    return Batch(
        torch.tensor(list(indices)), torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    )


def _batches(read: Callable[[int], tuple[Tensor, Tensor]], num_rows: int, size: int) -> Iterator[Batch]:
    start = 0
    while True:
        yield _batch(read, num_rows, range(start, start + size))
        start += size
