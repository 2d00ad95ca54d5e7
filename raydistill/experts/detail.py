"""Algorithm 2: the detail expert's draw and its critic's (DCM, sec. 3.3, eqs. 9, 10; its code's weights)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.losses import feature_matching, hinge_critic, hinge_generator
from raydistill.consistency.schedule import RECTIFIED_FLOW, diffuse, renoise
from raydistill.experts.semantic import (
    Jumped,
    Look,
    Losses,
    Segment,
    Term,
    Terms,
    add_up,
)
from raydistill.models.protocols import FeatureField
from raydistill.types import Batch, Latents, Times


@dataclass(frozen=True)
class Judges:
    """What the adversarial terms look through: the frozen, unguided teacher and the critic's heads on it."""

    teacher: FeatureField
    critic: nn.Module | None
    """None when the adversarial weight is 0."""
    blocks: Sequence[int]
    grid: tuple[int, int, int]
    """Token grid of one sample: frames, height, width."""
    real: str
    """'target': the consistency goal, as published; 'data': re-noised clean latents."""


@dataclass(frozen=True)
class CriticInputs:
    """Feature maps of the student's turn, detached: the teacher is frozen, the critic's turn reuses them."""

    fake: list[Tensor]
    real: list[Tensor]
    t: Times


def renoised_pair(
    segment: Segment, batch: Batch, pair: Jumped, leaf: Latents, real: str
) -> tuple[Latents, Latents, Times]:
    """Student's sample and the real one at one drawn time, with the same noise for both (DCM's code).

    Against data the student's sample is noised with the exact variance: DCM's straight line has up to 5 % too
    little where the grid ends before clean data, which the critic would see instead of the video. Against the
    target both take the straight line, as published; a variance-preserving path has none, and takes the
    exact variance.
    """
    _, a, s = segment.times(batch.index, "adversarial time")
    noise = segment.noise(batch.index, leaf, "adversarial noise")
    if real == "data":
        fake = diffuse(leaf, noise, a, s, segment.schedule)
        return fake, segment.schedule.add_noise(batch.latents, noise, a), a
    if segment.schedule != RECTIFIED_FLOW:
        fake, goal = (diffuse(x, noise, a, s, segment.schedule) for x in (leaf, pair.goal))
        return fake, goal, a
    return renoise(leaf, noise, a, s), renoise(pair.goal, noise, a, s), a


def adversarial_terms(
    judges: Judges, segment: Segment, batch: Batch, pair: Jumped, leaf: Latents, objective: ObjectiveConfig
) -> tuple[Terms, CriticInputs]:
    """Generator's hinge and feature matching on a leaf that stands for the guess; and the critic's inputs."""
    fake, real, a = renoised_pair(segment, batch, pair, leaf, judges.real)
    fake_maps, fake_seen = judges.teacher.features(fake, a, batch.text, judges.blocks)
    with torch.no_grad():
        real_maps, real_seen = judges.teacher.features(real, a, batch.text, judges.blocks)
    terms: dict[str, Term] = {}
    if objective.adversarial and judges.critic is not None:
        logits = judges.critic(fake_maps, judges.grid)
        terms["adversarial"] = Term(objective.adversarial, hinge_generator(logits), a)
    if objective.feature_matching:
        terms["feature_matching"] = Term(
            objective.feature_matching, feature_matching(fake_seen, real_seen), a
        )
    return terms, CriticInputs([m.detach() for m in fake_maps], real_maps, a)


def detail_look(judges: Judges, segment: Segment, objective: ObjectiveConfig) -> Look:
    """Give the detail expert's onlooker: critic and teacher's features, see `adversarial_terms`."""

    def look(batch: Batch, pair: Jumped, leaf: Latents) -> tuple[Terms, CriticInputs]:
        return adversarial_terms(judges, segment, batch, pair, leaf, objective)

    return look


def critic_losses(critic: nn.Module, seen: CriticInputs, grid: tuple[int, int, int]) -> Losses:
    """Critic's hinge on the features of the student's turn (DCM, eq. 10, with the margins of its code)."""
    value = hinge_critic(critic(seen.real, grid), critic(seen.fake, grid))
    return add_up({"critic": Term(1.0, value, seen.t)})
