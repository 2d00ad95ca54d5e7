"""Moving averages of what an engine trains."""

from dataclasses import dataclass

from torch import Tensor, nn

from raydistill.consistency.average import moving_average_
from raydistill.experts.engine import Engine


@dataclass
class SlowCopy:
    """A moving average of what the student trains: in float32, whatever the networks compute in.

    In bfloat16 an average would stand still: its steps are smaller than the spacing of its numbers.
    """

    weights: dict[str, Tensor]
    """By the student's parameter names; float32, whole on every rank."""
    decay: float
    net: nn.Module | None = None
    """The network that computes with them, in the student's dtype; None when nothing does."""

    def publish(self) -> None:
        """Copy the weights into the network, where it does not hold these very tensors."""
        own = dict(self.net.named_parameters()) if self.net is not None else {}
        for name, weight in self.weights.items() if own else ():
            if own[name].dtype != weight.dtype:
                own[name].data.copy_(weight)

    def follow(self, name: str, master: Tensor, steps: int) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta for one weight, after `steps` optimizer steps."""
        # Early on a slow average is mostly the starting point; let it follow the student at first.
        mu = min(self.decay, (1 + steps) / (10 + steps))
        moving_average_([self.weights[name]], [master], mu)


def follow(engine: Engine, copies: list[SlowCopy]) -> None:
    """Let averages of one engine's weights take a step, tensor by tensor, and publish them."""
    for name, weight in engine.masters() if copies else ():
        for slow in copies:
            slow.follow(name, weight, engine.steps)
    for slow in copies:
        slow.publish()
