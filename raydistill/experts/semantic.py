"""Algorithm 1: one draw of the consistency loss on a part of the path (DCM 3.2; MCM 3; CM, alg. 2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raydistill import draws
from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.function import jump, reach
from raydistill.consistency.losses import pseudo_huber, temporal_coherence
from raydistill.consistency.motion import REPRESENTATIONS
from raydistill.consistency.schedule import Schedule, TimeGrid
from raydistill.consistency.solver import euler
from raydistill.models.protocols import VelocityField
from raydistill.types import Batch, Indices, Latents, Origin, Text, Times


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
    """Frozen and already guided; by the lowest scale, where a segment draws them."""
    guided_by: Callable[[Latents, Times, Text, Times], Latents] | None = None
    """The frozen teacher with a guidance scale for each sample; used where a segment draws them."""
    in_step: bool = False
    """Whether every worker must make the teacher's pass, needed or not: its weights are gathered for it."""


@dataclass(frozen=True)
class Segment:
    """One expert's part of the path, (lower, upper], with the random numbers of its samples."""

    schedule: Schedule
    grid: TimeGrid
    upper: float
    lower: float
    """Where this expert's jumps end: the boundary for the semantic, grid.last for the other experts."""
    seed: int
    guidance: tuple[float, float] | None = None
    """Lowest and highest guidance scale, drawn for each sample; None: the teacher's own for all."""
    simulates: bool = False
    """Whether some samples start at the student's own one-step sample."""

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

    def scales(self, index: Indices) -> Times | None:
        """Guidance scale of each sample, uniform in `guidance`; None where all have the teacher's own."""
        if self.guidance is None:
            return None
        low, high = self.guidance
        return low + (high - low) * draws.uniform(self.seed, index, "guidance")


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
    length: Times
    """How far a unit of the network's prediction moves the guess, see `function.reach`."""


Look = Callable[[Batch, Jumped, Latents], tuple[Terms, Any]]
"""look(batch, pair, leaf): terms of what a network beside the student sees in `leaf`, which stands for the
guess, and whatever it wants to keep for its own turn."""


def _of(batch: Batch, origin: Origin) -> Tensor:
    """Which samples have this origin, bool (b,), on the CPU."""
    if batch.origin is None:
        return torch.full((len(batch.index),), origin == Origin.VIDEO)
    return batch.origin == origin


def _over(mask: Tensor, x: Latents) -> Tensor:
    """Shape one flag per sample to choose among latents, on their device."""
    return mask.to(x.device).view(-1, 1, 1, 1, 1)


@torch.no_grad()
def simulated(nets: Networks, segment: Segment, batch: Batch) -> Latents:
    """Student's own one-step sample of each caption, f(x_T, 1 -> 0), x_T ~ N(0, I) (MCM, eq. 7)."""
    pure = segment.noise(batch.index, batch.latents, "simulated noise")
    one = torch.ones(len(pure), dtype=torch.float64)
    return jump(segment.schedule, nets.target(pure, one, batch.text), pure, one, torch.zeros_like(one))


def _clean(nets: Networks, segment: Segment, batch: Batch) -> Latents:
    """x0 of each sample: its video, or its one-step sample."""
    if not segment.simulates:
        return batch.latents
    mine = _of(batch, Origin.SIMULATED)
    # At least one sample passes, needed or not: with sharded weights all ranks must come along.
    rows = mine.nonzero().flatten() if bool(mine.any()) else torch.zeros(1, dtype=torch.long)
    here = rows.to(batch.latents.device)
    x0, text = batch.latents[here], batch.text[here]
    made = simulated(nets, segment, Batch(batch.index[rows], x0, text))
    return batch.latents.index_copy(0, here, torch.where(_over(mine[rows], x0), made, x0))


def starting_point(nets: Networks, segment: Segment, batch: Batch, t: Times) -> Latents:
    """x_t of each sample: its video, or its one-step sample, noised; or the state of its recorded path.

    At t = 1 it is the noise alone: a variance-preserving schedule would leave some data in it, which sampling
    does not start with (MCM's code; LCM).
    """
    x0 = _clean(nets, segment, batch)
    noise = segment.noise(batch.index, x0)
    x_t = segment.schedule.add_noise(x0, noise, t)
    x_t = torch.where(_over(t >= 1, x_t), noise, x_t)
    if batch.x_r is None:
        return x_t
    return torch.where(_over(_of(batch, Origin.RECORDED), x_t), batch.latents, x_t)


@torch.no_grad()
def teacher_step(
    nets: Networks, segment: Segment, batch: Batch, x_t: Latents, times: tuple[Times, Times]
) -> Latents:
    """x_r, one step of the guided teacher's ODE below x_t; of recorded paths it is read, without a pass."""
    t, r = times
    scales = segment.scales(batch.index)
    if batch.x_r is None:
        return euler(segment.schedule, _field(nets, scales), x_t, t, r, batch.text)
    fresh = ~_of(batch, Origin.RECORDED)
    rows = fresh.nonzero().flatten()
    if not len(rows):
        if not nets.in_step:
            return batch.x_r
        rows = torch.zeros(1, dtype=torch.long)  # what comes of it is not taken
    here = rows.to(x_t.device)
    field = _field(nets, None if scales is None else scales[rows])
    x_r = euler(segment.schedule, field, x_t[here], t[rows], r[rows], batch.text[here])
    x_r = torch.where(_over(fresh[rows], x_r), x_r, batch.x_r[here])
    return batch.x_r.index_copy(0, here, x_r)


def _field(nets: Networks, scales: Times | None) -> VelocityField:
    """The guided teacher, by the scale of each sample where there are such."""
    by = nets.guided_by
    if scales is None or by is None:
        return nets.teacher
    return lambda x_t, t, text: by(x_t, t, text, scales)


def consistency_pair(nets: Networks, segment: Segment, batch: Batch) -> Jumped:
    """Jump to the segment's end twice: from x_t by the student, one teacher step nearer by the target."""
    schedule, text = segment.schedule, batch.text
    t, r, s = segment.times(batch.index)
    x_t = starting_point(nets, segment, batch, t)
    x_r = teacher_step(nets, segment, batch, x_t, (t, r))
    with torch.no_grad():
        goal = jump(schedule, nets.target(x_r, r, text), x_r, r, s)
    guess = jump(schedule, nets.student(x_t, t, text), x_t, t, s)
    return Jumped(guess, goal, t, s, reach(schedule, t, s))


def per_jump(x: Tensor, pair: Jumped, objective: ObjectiveConfig) -> Tensor:
    """Divide by the reach of its jump: an error of the network counts alike at every t."""
    if not objective.normalise_jump:
        return x
    return x / pair.length.view(-1, *(1 for _ in x.shape[1:])).to(x)


def consistency_terms(pair: Jumped, objective: ObjectiveConfig) -> Terms:
    """Pseudo-Huber distance of latents (DCM, eq. 7) and of their motion (MCM, eq. 6), temporal coherence.

    A term of weight 0 is not computed. A learned representation is not here: see `motion`.
    """
    guess, goal = (per_jump(x, pair, objective) for x in (pair.guess, pair.goal))
    terms: dict[str, Term] = {}
    if objective.consistency:
        value = pseudo_huber(guess, goal, objective.huber_c)
        terms["consistency"] = Term(objective.consistency, value, pair.t)
    if objective.motion and (represent := REPRESENTATIONS.get(objective.representation)):
        ours, theirs = (per_jump(represent(x), pair, objective) for x in (pair.guess, pair.goal))
        terms["motion"] = Term(objective.motion, pseudo_huber(ours, theirs, objective.huber_c), pair.t)
    if objective.temporal_coherence:
        coherence = temporal_coherence(guess, goal, objective.coherence_stride)
        terms["temporal_coherence"] = Term(objective.temporal_coherence, coherence, pair.t)
    return terms


def add_up(terms: Terms) -> Losses:
    """Weighted sum, averaged over the batch; 0 where there are no terms."""
    total = sum((term.weight * term.value.mean() for term in terms.values()), torch.zeros(()))
    return Losses(total, {name: replace(term, value=term.value.detach()) for name, term in terms.items()})


def consistency_losses(
    nets: Networks,
    segment: Segment,
    batch: Batch,
    objective: ObjectiveConfig,
    looks: Mapping[str, Look] | None = None,
) -> tuple[Losses, dict[str, Any]]:
    """One draw of L, and what each onlooker keeps for its own turn.

    Of what the onlookers say, the gradient with respect to a leaf that stands for the guess is taken at once
    and handed to the student by one product: their graphs are freed before the student's, and engines of
    their own see none of it.
    """
    pair = consistency_pair(nets, segment, batch)
    own = add_up(consistency_terms(pair, objective))
    total, terms, kept = own.total, dict(own.terms), dict[str, Any]()
    gradient = torch.zeros_like(pair.guess)
    for name, look in (looks or {}).items():
        leaf = pair.guess.detach().requires_grad_()
        said, kept[name] = look(batch, pair, leaf)
        extra = add_up(said)
        if said:
            gradient += torch.autograd.grad(extra.total, leaf)[0]
        total, terms = total + extra.total.detach(), terms | dict(extra.terms)
    if looks:
        # The product's gradient is theirs; its own value is no loss and is taken out again.
        through = (pair.guess * gradient).sum()
        total = total + through - through.detach()
    return Losses(total, terms), kept
