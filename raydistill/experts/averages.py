"""Moving averages of what an engine trains."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from raydistill.consistency.average import moving_average_
from raydistill.experts.parts import Parts, save_parts
from raydistill.experts.plain_engine import rank_and_size
from raydistill.experts.protocols import Engine


@dataclass
class SlowCopy:
    """A moving average of what the student trains: in float32, whatever the networks compute in.

    In bfloat16 an average would stand still: its steps are smaller than the spacing of its numbers.
    """

    weights: dict[str, Tensor]
    """By the student's parameter names; float32. Whole on every rank where a network computes with them;
    else what the engine keeps on this rank, see `Engine.shares`."""
    decay: float
    net: nn.Module | None = None
    """The network that computes with them, in the student's dtype; None when nothing does."""

    def whole(self, engine: Engine) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights whole, one by one; all ranks together."""
        for name, weight in self.weights.items():
            yield name, weight if self.net is not None else engine.join(name, weight)

    def take(self, engine: Engine, name: str, value: Tensor) -> None:
        """Set one weight from a whole tensor."""
        self.weights[name].copy_(value if self.net is not None else engine.cut(name, value))

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


def kept_average(engine: Engine, decay: float) -> SlowCopy:
    """Begin an average that nothing computes with at an engine's weights."""
    return SlowCopy({name: share.detach().clone() for name, share in engine.shares()}, decay)


def follow(engine: Engine, copies: list[SlowCopy]) -> None:
    """Let averages of one engine's weights take a step, tensor by tensor, and publish them."""
    whole = [slow for slow in copies if slow.net is not None or not engine.divided]
    divided = [slow for slow in copies if slow.net is None and engine.divided]
    for source, some in ((engine.masters, whole), (engine.shares, divided)):
        for name, weight in source() if some else ():
            for slow in some:
                slow.follow(name, weight, engine.steps)
    for slow in copies:
        slow.publish()


@dataclass(frozen=True)
class Averages:
    """All moving averages of a stage, as its checkpoints keep them: whole tensors, dealt out to the ranks."""

    copies: Mapping[str, tuple[Engine, SlowCopy]]
    """With the engine that each follows, by name."""

    def save(self, folder: Path) -> None:
        """Write them, each rank its share."""
        rank, world_size = rank_and_size()
        steps = max((engine.steps for engine, _ in self.copies.values()), default=0)
        save_parts(folder, self._tensors(), step=steps, rank=rank, world_size=world_size)

    def load(self, folder: Path) -> None:
        """Read them back, on any number of ranks and at any ZeRO stage."""
        parts = Parts(folder)
        for kind, (engine, slow) in self.copies.items():
            parts.require({name: engine.shapes[name] for name in slow.weights}, kind)
            for name in slow.weights:
                slow.take(engine, name, parts.get(kind, name))
            slow.publish()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for kind, (engine, slow) in self.copies.items():
            for name, weight in slow.whole(engine):
                yield f"{kind}/{name}", weight
