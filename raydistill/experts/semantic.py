"""Algorithm 1: one draw of the consistency loss on one expert's part of the path (DCM 3.2; CM, alg. 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raydistill import draws
from raydistill.config.distill import ObjectiveConfig
from raydistill.consistency.function import jump
from raydistill.consistency.losses import pseudo_huber, temporal_coherence
from raydistill.consistency.schedule import RectifiedFlow, TimeGrid
from raydistill.consistency.solver import euler
from raydistill.models.protocols import VelocityField
from raydistill.types import Batch, Indices, Latents, Times


@dataclass(frozen=True)
class Term:
    """One part of the objective."""

    weight: float
    value: Tensor
    """Per sample, float32 (b,)."""
    t: Times
    """Noise level at which it was measured."""


Terms = Mapping[str, Term]


@dataclass(frozen=True)
class Networks:
    """Who takes part in the consistency loss; only the student has gradients."""

    student: VelocityField
    target: VelocityField
    """The student's slow copy or the student itself, theta^-; never the teacher."""
    teacher: VelocityField
    """Frozen and already guided."""


@dataclass(frozen=True)
class Segment:
    """One expert's part of the path, (lower, upper], with the random numbers of its samples."""

    schedule: RectifiedFlow
    grid: TimeGrid
    upper: float
    lower: float
    """Where this expert's jumps end: the boundary for the semantic, grid.last for the detail expert."""
    seed: int

    def times(self, index: Indices, purpose: str = "time") -> tuple[Times, Times, Times]:
        """(t, r, s) with t > r >= s: an interval of the grid inside the segment, and the segment's end."""
        inside = self.grid.intervals_in(self.upper, self.lower)
        picked = draws.integers(self.seed, index, purpose, len(inside)) + inside.start
        t, r = self.grid.interval(picked)
        return t, r, torch.full_like(t, self.lower)

    def levels(self, count: int) -> list[float]:
        """Increasing times that part the segment into `count` ranges with about as many intervals each.

        Even in what is drawn, not in time: a shifted grid has nearly all of its times at the noise.
        """
        inside = self.grid.intervals_in(self.upper, self.lower)
        parts = min(count, len(inside))
        return [self.grid.nodes[inside.start + len(inside) * k // parts] for k in range(parts, -1, -1)]

    def noise(self, index: Indices, like: Latents, purpose: str = "noise") -> Latents:
        """Standard normal noise of the samples `index`, shaped like `like`."""
        return draws.noise(self.seed, index, purpose, tuple(like.shape[1:])).to(like)


@dataclass(frozen=True)
class Losses:
    """What one micro-batch says: the total to descend, and its parts for the record."""

    total: Tensor
    terms: Terms
    """Detached."""


@dataclass(frozen=True)
class Jumped:
    """Student's guess and its goal at the end of the segment, with the times that led there."""

    guess: Latents
    goal: Latents
    t: Times
    s: Times


def consistency_pair(nets: Networks, segment: Segment, batch: Batch) -> Jumped:
    """Jump to the segment's end twice: from x_t by the student, one teacher step nearer by the target."""
    schedule, x0, text = segment.schedule, batch.latents, batch.text
    t, r, s = segment.times(batch.index)
    x_t = schedule.add_noise(x0, segment.noise(batch.index, x0), t)
    with torch.no_grad():
        x_r = euler(schedule, nets.teacher, x_t, t, r, text)
        goal = jump(schedule, nets.target(x_r, r, text), x_r, r, s)
    guess = jump(schedule, nets.student(x_t, t, text), x_t, t, s)
    return Jumped(guess, goal, t, s)


def consistency_terms(pair: Jumped, objective: ObjectiveConfig) -> Terms:
    """Pseudo-Huber distance and temporal coherence (DCM, eqs. 7, 8); a term of weight 0 is not computed."""
    guess, goal = pair.guess, pair.goal
    if objective.normalise_jump:
        # A jump of length t - s scales the error by t - s; without this, short jumps hardly count.
        length = (pair.t - pair.s).view(-1, 1, 1, 1, 1).to(guess)
        guess, goal = guess / length, goal / length
    terms = {"consistency": Term(1.0, pseudo_huber(guess, goal, objective.huber_c), pair.t)}
    if objective.temporal_coherence:
        coherence = temporal_coherence(guess, goal, objective.coherence_stride)
        terms["temporal_coherence"] = Term(objective.temporal_coherence, coherence, pair.t)
    return terms


def add_up(terms: Terms) -> Losses:
    """Weighted sum, averaged over the batch."""
    total = torch.stack([term.weight * term.value.mean() for term in terms.values()]).sum()
    return Losses(total, {name: replace(term, value=term.value.detach()) for name, term in terms.items()})


def semantic_losses(nets: Networks, segment: Segment, batch: Batch, objective: ObjectiveConfig) -> Losses:
    """One draw of L for t in (boundary, 1]; the goal is x at the boundary, not x0."""
    pair = consistency_pair(nets, segment, batch)
    return add_up(consistency_terms(pair, objective))
