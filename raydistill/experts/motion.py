"""The learned motion representation in training: a head, its slow copy, its own turn (MCM, sec. 3.2)."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.losses import pseudo_huber
from raydistill.experts.semantic import Jumped, Losses, Term, Terms, add_up, per_jump
from raydistill.types import Batch, Latents


@dataclass(frozen=True)
class LearnedMotion:
    """Distance of the head's view of the guess from the slow head's view of the goal (MCM, eq. 6)."""

    head: nn.Module
    """M, trained beside the student."""
    slow: nn.Module
    """M^-, its moving average."""
    objective: ObjectiveConfig

    def distance(self, guess: Latents, pair: Jumped) -> Tensor:
        """Pseudo-Huber distance per sample."""
        ours, theirs = (per_jump(x, pair, self.objective) for x in (self.head(guess), self.slow(pair.goal)))
        return pseudo_huber(ours, theirs, self.objective.huber_c)

    def look(self, batch: Batch, pair: Jumped, leaf: Latents) -> tuple[Terms, Jumped]:
        """Return the motion term of the student's turn."""
        terms = {"motion": Term(self.objective.motion, self.distance(leaf, pair), pair.t)}
        return terms, replace(pair, guess=pair.guess.detach())

    def turn(self, seen: Jumped) -> Losses:
        """Return the head's own loss: the same distance, of a guess that is given."""
        value = self.distance(seen.guess, seen)
        return add_up({"motion_head": Term(self.objective.motion, value, seen.t)})
