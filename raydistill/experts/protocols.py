"""What training asks of an engine, and checkpoints of whatever they keep."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Saved(Protocol):
    """Something that a checkpoint keeps in a folder of its own. All ranks call every method."""

    def save(self, folder: Path) -> None:
        """Write it, each rank its share."""
        ...

    def load(self, folder: Path) -> None:
        """Read it back, on any number of ranks. Raises IncompatibleCheckpoint."""
        ...


class Engine(Protocol):
    """A trainable network, its optimizer, its share of the machines. All ranks call every method."""

    module: nn.Module
    """For forward passes. Its parameters may be shards; `masters` gives whole ones."""
    trainable_parameters: dict[str, nn.Parameter]
    """By name, in a fixed order."""
    shapes: dict[str, torch.Size]
    """Of the whole trainable parameters, by name."""
    dtype: torch.dtype
    """Of the module's weights; inputs must be cast to it."""
    steps: int
    """Optimizer steps done."""
    grad_norm: float | None
    """Global gradient norm of the last step, before clipping; None before the first."""

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step: a pure function of `steps`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided here by the micro-batches of a round."""
        ...

    def step(self) -> bool:
        """Close a micro-batch; clip and update at the end of a round. True if an optimizer step happened."""
        ...

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 parameter) one by one, on their device; for reading, one at a time."""
        ...

    @property
    def divided(self) -> bool:
        """Whether a rank keeps only its part of each parameter."""
        ...

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, what this rank keeps of the float32 parameter, its part or all); for reading."""
        ...

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's share of a whole tensor of a parameter's shape, as `shares` has it."""
        ...

    def join(self, name: str, share: Tensor) -> Tensor:
        """Put a whole tensor together from all ranks' shares, on the parameter's device."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return whole float32 copies of the trainable parameters, on the CPU of every rank."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer states, each rank its share. Call it between rounds."""
        ...

    def load(self, folder: Path) -> None:
        """Read them back, on any number of ranks. Raises IncompatibleCheckpoint."""
        ...

    def close(self) -> None:
        """Free hooks and buffers; the engine is of no use afterwards."""
        ...
