"""Random numbers as functions of (seed, global sample index, purpose): no generator has a state to lose.

However samples are split over batches, workers or restarts, each draws the same numbers. The generator is
Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): counter based, so a fresh stream
per sample is cheap and streams of different keys are independent. What it returns is part of the
reproducibility contract and is pinned by golden values in the tests: changing it changes every run.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydistill import keyed
from raydistill.types import Indices


def _generators(seed: int, indices: Indices | Sequence[int], purpose: str) -> list[np.random.Generator]:
    return keyed.generators(seed, _listed(indices), purpose)


def _listed(indices: Indices | Sequence[int]) -> Sequence[int]:
    return indices.tolist() if isinstance(indices, Tensor) else indices


def noise(seed: int, indices: Indices | Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 (b, *shape), on the CPU.

    `indices` are global sample indices, 0 or more; `purpose` names what the numbers are for, so that two uses
    of one sample are independent.
    """
    drawn = [g.standard_normal(tuple(shape), dtype=np.float32) for g in _generators(seed, indices, purpose)]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty((0, *shape))


def uniform(seed: int, indices: Indices | Sequence[int], purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float64 (b, *shape)."""
    drawn = [g.random(tuple(shape)) for g in _generators(seed, indices, purpose)]
    return torch.from_numpy(np.array(drawn, dtype=np.float64).reshape(len(drawn), *shape))


def integers(seed: int, indices: Indices | Sequence[int], purpose: str, high: int) -> Tensor:
    """Integers in [0, high), int64 (b,). Raises ValueError unless high >= 1."""
    return torch.tensor(keyed.integers(seed, _listed(indices), purpose, high), dtype=torch.int64)
