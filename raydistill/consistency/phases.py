"""Phases of the path, each with its own end (PCM, sec. 3.1; DCM, sec. 3.2): no jump leaves its phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from raydistill.consistency.schedule import SAME_TIME, TimeGrid
from raydistill.errors import InvalidValue, SamplingError
from raydistill.types import Times


@dataclass(frozen=True)
class Phases:
    """Intervals (edges[k + 1], edges[k]], from noise to data; a time on an edge is in the lower phase."""

    edges: tuple[float, ...]

    def __post_init__(self):
        """Check that edges fall from 1 to [0, 1). Raises InvalidValue."""
        falls = all(a - b > SAME_TIME for a, b in pairwise(self.edges))
        if len(self.edges) < 2 or not falls or self.edges[0] != 1.0 or self.edges[-1] < 0:
            raise InvalidValue("edges", self.edges, "decreasing times from 1 down to at least 0")

    @staticmethod
    def dual(boundary: float, last: float = 0.0) -> "Phases":
        """DCM's two: semantic (boundary, 1] and detail (last, boundary]."""
        return Phases((1.0, boundary, last))

    @staticmethod
    def single(last: float = 0.0) -> "Phases":
        """One phase, an ordinary consistency model (CM)."""
        return Phases((1.0, last))

    def index(self, t: Times) -> Int[Tensor, " b"]:
        """Phase of each t, 0 at the noise; times at or below the last edge count to the last phase.

        Compared in float64 with a tolerance above float32's rounding, so that a boundary that went through
        float32 is still the boundary. Raises ValueError for half precision, whose spacing near 1 is wider
        than a step.
        """
        if t.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"times must be float64 or float32: {t.dtype} cannot tell neighbours apart")
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=t.device)
        return (t.double()[:, None] <= inner + SAME_TIME).sum(dim=1)

    def end(self, t: Times) -> Times:
        """s, the lower edge of the phase of each t, in float64."""
        ends = torch.tensor(self.edges[1:], dtype=torch.float64, device=t.device)
        return ends[self.index(t)]

    def require_no_crossing(self, times: Sequence[float]) -> None:
        """Raise SamplingError if a jump between successive times passes an edge without stopping at it."""
        for t, s in pairwise(times):
            for edge in self.edges[1:-1]:
                if s + SAME_TIME < edge < t - SAME_TIME:
                    raise SamplingError(
                        f"the jump from {t:.6g} to {s:.6g} crosses the boundary {edge:.6g}, which no expert "
                        f"was trained for: end a jump at {edge:.6g}"
                    )


def split_times(phases: Phases, num_steps: int, grid: TimeGrid) -> tuple[float, ...]:
    """Give num_steps + 1 nodes of the grid, split evenly between phases and inside each (DCM, suppl. 7).

    With an odd count the phases nearer the noise get the extra steps: most of the loss is made there. A half
    interval is rounded towards the noise, as in the authors' lists (HunyuanVideo, 4 steps: 49, 43 | 37, 18).
    Raises SamplingError if a phase would get no step, or more than it has intervals; InvalidValue if an edge
    is no node of the grid.
    """
    num_phases = len(phases.edges) - 1
    if num_steps < num_phases:
        raise SamplingError(
            f"{num_steps} steps for {num_phases} phases: each needs one, to stop at {phases.edges[1:-1]}"
        )
    times: list[float] = []
    for k, (upper, lower) in enumerate(pairwise(phases.edges)):
        steps = num_steps // num_phases + (k < num_steps % num_phases)
        times += split_evenly(upper, lower, steps, grid)[:-1]
    return (*times, grid.snap(phases.edges[-1]))


def split_evenly(upper: float, lower: float, num_steps: int, grid: TimeGrid) -> tuple[float, ...]:
    """Give num_steps + 1 nodes of the grid from upper to lower, evenly many intervals apart.

    Raises SamplingError unless 1 <= num_steps <= intervals between; InvalidValue if an end is no node of the
    grid.
    """
    inside = _room(num_steps, upper, lower, grid)
    nodes = [inside.start + _round_half_down(j * len(inside), num_steps) for j in range(num_steps + 1)]
    times = grid.nodes
    return tuple(times[k] for k in nodes)


def lcm_times(num_steps: int, upper: float, lower: float, grid: TimeGrid) -> tuple[float, ...]:
    """Give LCM's inference times, floor(j N / n) intervals below `upper`, and `lower` (LCM's code; MCM).

    On 50 intervals and 1000 timesteps, 4 steps start at timesteps 999, 759, 499 and 259.
    Raises SamplingError unless 1 <= num_steps <= intervals between; InvalidValue if an end is no node of the
    grid.
    """
    inside = _room(num_steps, upper, lower, grid)
    times = grid.nodes
    starts = [times[inside.start + j * len(inside) // num_steps] for j in range(num_steps)]
    return (*starts, times[inside.stop])


def _room(num_steps: int, upper: float, lower: float, grid: TimeGrid) -> range:
    """Return the intervals between two nodes. Raises SamplingError unless they hold so many steps."""
    inside = grid.intervals_in(upper, lower)
    if not 1 <= num_steps <= len(inside):
        raise SamplingError(
            f"{num_steps} steps from {upper:.6g} to {lower:.6g}: the grid has {len(inside)} intervals"
        )
    return inside


def _round_half_down(a: int, b: int) -> int:
    """Nearest integer to a / b, the lower one when in the middle."""
    return -((b - 2 * a) // (2 * b))
