"""Weights -> latents in few steps. Knows neither Ray nor training.

A plan says, in plain numbers, which expert jumps from which time to which; it is stored with the weights.
Experts are chosen by comparing float64 times when the plan is built, never from a tensor that went through
the network's dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from raydistill import draws
from raydistill.consistency.function import jump
from raydistill.consistency.phases import Phases, lcm_times, split_evenly, split_times
from raydistill.consistency.schedule import SAME_TIME, Schedule, TimeGrid, diffuse
from raydistill.errors import SamplingError, UnknownKey
from raydistill.models.protocols import VelocityField
from raydistill.types import Indices, Latents, Text

Path = Literal["deterministic", "renoise"]
Expert = Literal["semantic", "detail", "teacher"]
VERSION = 1


@dataclass(frozen=True)
class Jump:
    """One step of a plan: `expert` takes the sample from t to s < t."""

    t: float
    s: float
    expert: Expert
    extrapolates: bool = False
    """Its straight line is followed past the boundary, where it was not trained: one-step plans only."""


@dataclass(frozen=True)
class SamplingPlan:
    """Jumps from noise (t = 1) to data (s = 0), each starting where the one before ended.

    Raises SamplingError for a chain with a gap, for a student's jump across the boundary (the only exception
    is one single jump that says `extrapolates`), and for an expert outside its range.
    """

    jumps: tuple[Jump, ...]
    path: Path = "deterministic"
    """`deterministic`: follow the prediction to s. `renoise`: follow it to the end of the phase, then noise
    back up to s (CM, alg. 1; LCM). The teacher always goes straight to s."""
    boundary: float | None = None
    """Where the semantic expert hands over; None: one expert for the whole range, called `semantic`."""
    last: float = 0.0
    """Where the lowest phase ended in training. The last jump goes on to 0 with that velocity, as in DCM."""

    def __post_init__(self):
        """Check the chain and every jump."""
        if self.path not in get_args(Path):
            raise SamplingError(f"path '{self.path}' is not one of {', '.join(get_args(Path))}")
        if not self.jumps or self.jumps[0].t != 1.0 or self.jumps[-1].s != 0.0:
            raise SamplingError("a plan starts at t = 1 and ends at s = 0")
        for before, after in pairwise(self.jumps):
            if before.s != after.t:
                raise SamplingError(f"a jump ends at {before.s:.6g} but the next starts at {after.t:.6g}")
        for one in self.jumps:
            self._check(one)

    def _check(self, one: Jump) -> None:
        if not one.t > one.s >= 0.0:
            raise SamplingError(f"the jump from {one.t:.6g} to {one.s:.6g} does not go towards the data")
        if one.expert not in get_args(Expert):
            raise SamplingError(f"expert '{one.expert}' is not one of {', '.join(get_args(Expert))}")
        if one.expert == "teacher" or one.extrapolates:
            alone = len(self.jumps) == 1 and one.expert == "semantic" and self.boundary is not None
            if one.extrapolates and not alone:
                raise SamplingError("only the single semantic jump of a one-step dual plan extrapolates")
            return
        self.phases.require_no_crossing((one.t, one.s))
        if one.expert != _owner(self.boundary, one.t):
            raise SamplingError(
                f"the {one.expert} expert does not own t = {one.t:.6g} at boundary {self.boundary}"
            )

    @property
    def phases(self) -> Phases:
        """Of the student."""
        return _phases(self.boundary, self.last)

    def landing(self, one: Jump) -> float:
        """Where the prediction is followed to: s, or the lower end of the phase when re-noising."""
        if self.path == "deterministic" or one.expert == "teacher":
            return one.s
        end = self.phases.end(torch.tensor([one.t], dtype=torch.float64)).item()
        return min(one.s, end)

    def passes(self, tail_guided: bool = True) -> int:
        """Network passes per sample; a guided teacher's step counts as 2, even if both go in one batch."""
        teacher = sum(one.expert == "teacher" for one in self.jumps)
        return len(self.jumps) + teacher * tail_guided

    def to_dict(self) -> dict[str, Any]:
        """Plain values with a `version`; `from_dict` is the inverse."""
        return {"version": VERSION, **asdict(self), "jumps": [asdict(one) for one in self.jumps]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "SamplingPlan":
        """Read `to_dict`'s form. Raises UnknownKey; SamplingError for another version or a missing value."""
        values = dict(values)
        if (version := values.pop("version", None)) != VERSION:
            raise SamplingError(f"sampling plan of version {version}; this program reads version {VERSION}")
        listed = values.pop("jumps", None)
        if not isinstance(listed, list | tuple):
            raise SamplingError("a sampling plan lists its jumps")
        jumps = tuple(_record(Jump, one, f"jumps[{i}].") for i, one in enumerate(listed))
        return _record(SamplingPlan, {"jumps": jumps, **values})


def _record(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    if not isinstance(values, Mapping):
        raise SamplingError(f"{prefix or 'sampling plan'}: {values!r} is no set of named values")
    known = tuple(f.name for f in fields_of(kind))
    for key in values:
        if key not in known:
            raise UnknownKey(prefix + key, tuple(prefix + name for name in known))
    try:
        return kind(**values)
    except TypeError as error:
        raise SamplingError(f"a sampling plan that cannot be read: {error}") from error


def _phases(boundary: float | None, last: float) -> Phases:
    return Phases.single(last) if boundary is None else Phases.dual(boundary, last)


def _owner(boundary: float | None, t: float) -> Expert:
    """Expert of time t; the boundary itself is the detail expert's."""
    return "detail" if boundary is not None and t <= boundary + SAME_TIME else "semantic"


def plan_times(
    times: tuple[float, ...], boundary: float | None, last: float = 0.0, path: Path = "deterministic"
) -> SamplingPlan:
    """Make a plan of the user's own times, from 1 to 0; one must be the boundary. Raises SamplingError."""
    jumps = tuple(Jump(t, s, _owner(boundary, t)) for t, s in pairwise(times))
    return SamplingPlan(jumps, path, boundary, last)


def build_plan(
    num_steps: int, boundary: float | None, grid: TimeGrid, path: Path = "deterministic"
) -> SamplingPlan:
    """Plan with steps split evenly between the experts and inside each range (DCM, suppl. 7; `split_times`).

    One step with a dual expert is one pass of the semantic expert, whose straight line is followed to 0:
    outside what it was trained for, hence marked `extrapolates`. boundary must be a node of the grid. Raises
    InvalidValue if it is not, SamplingError for more steps than intervals.
    """
    if boundary is None:
        return plan_times(
            _to_data(split_times(_phases(None, grid.last), num_steps, grid)), None, grid.last, path
        )
    boundary = grid.snap(boundary)
    if num_steps == 1:
        return SamplingPlan((Jump(1.0, 0.0, "semantic", extrapolates=True),), path, boundary, grid.last)
    times = _to_data(split_times(_phases(boundary, grid.last), num_steps, grid))
    return plan_times(times, boundary, grid.last, path)


def plan_lcm(num_steps: int, grid: TimeGrid, path: Path = "renoise") -> SamplingPlan:
    """Plan of one expert at LCM's times (LCM; MCM): raises SamplingError for more steps than intervals."""
    return plan_times(_to_data(lcm_times(num_steps, 1.0, grid.last, grid)), None, grid.last, path)


def teacher_plan(num_steps: int, grid: TimeGrid) -> SamplingPlan:
    """Euler steps of the teacher alone, even in shifted time: the reference, at any number of steps."""
    return SamplingPlan(_teacher_jumps(TimeGrid(num_steps, grid.shift).nodes))


def with_tail(
    num_steps: int,
    boundary: float,
    grid: TimeGrid,
    path: Path = "deterministic",
    tail_steps: int | None = None,
) -> SamplingPlan:
    """Semantic steps to the boundary, then the teacher over the grid's nodes (all of them, or tail_steps)."""
    upper, lower = _halves(boundary, grid, num_steps, tail_steps)
    semantic = tuple(Jump(t, s, "semantic") for t, s in pairwise(upper))
    return SamplingPlan((*semantic, *_teacher_jumps(lower)), path, grid.snap(boundary), grid.last)


def with_head(
    num_steps: int,
    boundary: float,
    grid: TimeGrid,
    path: Path = "deterministic",
    head_steps: int | None = None,
) -> SamplingPlan:
    """Teacher over the grid's nodes (all of them, or head_steps) to the boundary, then detail steps."""
    upper, lower = _halves(boundary, grid, head_steps, num_steps)
    detail = tuple(Jump(t, s, "detail") for t, s in pairwise(lower))
    return SamplingPlan((*_teacher_jumps(upper), *detail), path, grid.snap(boundary), grid.last)


def _halves(
    boundary: float, grid: TimeGrid, upper_steps: int | None, lower_steps: int | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Times above and below the boundary, each split evenly; None takes every node."""
    node, boundary = grid.node(boundary), grid.snap(boundary)
    upper = split_evenly(1.0, boundary, node if upper_steps is None else upper_steps, grid)
    rest = grid.num_intervals - node
    return upper, _to_data(
        split_evenly(boundary, grid.last, rest if lower_steps is None else lower_steps, grid)
    )


def default_plan(plans: Mapping[str, SamplingPlan]) -> str:
    """Name '4', or else the largest number of steps among plans by name."""
    own = [name for name in plans if name.isdecimal()] or list(plans)
    return "4" if "4" in plans else max(own, key=lambda name: len(plans[name].jumps))


def _teacher_jumps(times: tuple[float, ...]) -> tuple[Jump, ...]:
    return tuple(Jump(t, s, "teacher") for t, s in pairwise(times))


def _to_data(times: tuple[float, ...]) -> tuple[float, ...]:
    """Let the last jump go on to clean data."""
    return (*times[:-1], 0.0)


NoiseAt = Callable[[int, tuple[int, ...]], Tensor]
"""noise_at(k, shape): standard normal numbers; k = 0 is where sampling starts, k = i + 1 follows jump i."""

OnStep = Callable[[int, Jump, Latents], None]
"""on_step(i, jump, x0): called after jump i with the expert's prediction of the clean latents."""


def keyed_noise(seed: int, indices: Indices) -> NoiseAt:
    """Noise that depends on (seed, global sample index, k) alone, so never on the batch."""

    def noise_at(k: int, shape: tuple[int, ...]) -> Tensor:
        return draws.noise(seed, indices, f"sample/{k}", shape[1:])

    return noise_at


@torch.no_grad()
def sample(
    fields: Mapping[str, VelocityField],
    schedule: Schedule,
    plan: SamplingPlan,
    noise: Latents,
    text: Text,
    *,
    noise_at: NoiseAt | None = None,
    network_dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Follow the plan from `noise`; deterministic in its arguments.

    The state keeps the dtype of `noise`, float32 or float64; only what the networks see is cast to
    network_dtype. fields maps the plan's experts to networks; guide the teacher beforehand (`solver.guided`).
    The re-noising path needs `noise_at` (`keyed_noise`). Raises SamplingError for a missing field or noise,
    or a state in half precision.
    """
    _require_inputs(fields, plan, noise, noise_at)
    x = noise
    for i, one in enumerate(plan.jumps):
        x, x0 = take_step(fields, schedule, plan, i, x, text, noise_at=noise_at, network_dtype=network_dtype)
        if on_step is not None:
            on_step(i, one, x0)
    return x


@torch.no_grad()
def take_step(
    fields: Mapping[str, VelocityField],
    schedule: Schedule,
    plan: SamplingPlan,
    i: int,
    x: Latents,
    text: Text,
    *,
    noise_at: NoiseAt | None = None,
    network_dtype: torch.dtype | None = None,
) -> tuple[Latents, Latents]:
    """Take jump i of the plan from the state x at its t: the state at its s, and the predicted clean data.

    `sample` is nothing but these in turn, so a sample that stopped after jump i - 1 goes on from its state
    and ends in the same bits. The re-noising path needs `noise_at` (`keyed_noise`).
    """
    one = plan.jumps[i]
    stops = (one.t, one.s, plan.landing(one))
    t, s, land = (torch.full((len(x),), u, dtype=torch.float64, device=x.device) for u in stops)
    inputs = network_dtype or x.dtype
    prediction = fields[one.expert](x.to(inputs), t, text.to(inputs)).to(x.dtype)
    after = jump(schedule, prediction, x, t, land)
    if noise_at is not None and plan.landing(one) < one.s:
        after = diffuse(after, noise_at(i + 1, tuple(x.shape)).to(x), s, land, schedule)
    return after, schedule.to_x0(prediction, x, t)


def _require_inputs(
    fields: Mapping[str, VelocityField], plan: SamplingPlan, noise: Latents, noise_at: NoiseAt | None
) -> None:
    if noise.dtype not in (torch.float32, torch.float64):
        raise SamplingError(f"the state is kept in float32 or float64, not {noise.dtype}: use network_dtype")
    if missing := sorted({one.expert for one in plan.jumps} - set(fields)):
        raise SamplingError(
            f"the plan needs {', '.join(missing)}; given: {', '.join(sorted(fields)) or 'none'}"
        )
    if noise_at is None and any(plan.landing(one) < one.s for one in plan.jumps):
        raise SamplingError("the re-noising path needs noise_at, for example keyed_noise(seed, indices)")
