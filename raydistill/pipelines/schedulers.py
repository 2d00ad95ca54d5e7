"""The student's times as pipelines of diffusers take them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)
from scipy.optimize import brentq

from raydistill.consistency.schedule import SAME_TIME, TimeGrid, VariancePreserving
from raydistill.errors import InvalidValue
from raydistill.models.teacher import schedule_from_dict
from raydistill.sampler import SamplingPlan, plan_times
from raydistill.student import Card

TAKES_TIMES = {"HunyuanVideoPipeline": "sigmas", "CogVideoXPipeline": "timesteps"}
"""Argument of a pipeline's call that holds the times; others have what their scheduler says."""
WIDEST = 3.0
"""Power of ten of the largest shift, and of the inverse of the smallest, that a fit may take."""


@dataclass(frozen=True)
class Steps:
    """How a pipeline takes a student's steps."""

    scheduler: Any
    """Of diffusers, as it is saved with the pipeline."""
    plan: SamplingPlan
    """That the lines of the model card take."""
    bare: tuple[float, ...]
    """Where the steps start by the scheduler's config alone, in a call that names but their number."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Times that the pipeline's call is given beside the number of steps."""
    timesteps: tuple[int, ...] = ()
    """Times that the scheduler is given, where the call takes none and the config alone has others."""

    @property
    def times(self) -> tuple[float, ...]:
        """Where the steps start, decreasing from 1."""
        return tuple(one.t for one in self.plan.jumps)


def steps_of(kind: str, card: Card, plan: SamplingPlan, name: str, path: str = "") -> Steps:
    """Give the scheduler with which the pipeline `kind`, a class of diffusers, takes the steps of a plan.

    path: 'deterministic' or 'renoise' in place of the plan's own. Flow schedulers are fitted, see `fit_flow`.
    Re-noising schedulers (LCM) noise the predicted clean data, so the plan that comes back ends at 0 even
    where the stored one was trained to end at `last`. Raises InvalidValue for a plan that no scheduler takes:
    with steps of the teacher, an extrapolating jump, two experts that re-noise.
    """
    plan = replace(plan, path=cast(Any, path) or plan.path)
    if why := _not_taken(plan):
        raise InvalidValue("pipeline_plan", name, f"a plan that diffusers' {kind} can take: {why}")
    renoises = plan.path == "renoise" and len(plan.jumps) > 1
    if renoises:
        plan = plan_times((*(one.t for one in plan.jumps), 0.0), None, 0.0, "renoise")
    if not card.schedule:
        return _flow_steps(kind, card.grid, plan, renoises)
    steps = [round(1000 * one.t) - 1 for one in plan.jumps]
    made = _lcm(card) if renoises else _dpm(card)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, about diffusers
        made.set_timesteps(len(steps))
    bare = tuple((step + 1) / 1000 for step in made.timesteps.tolist())
    if kind in TAKES_TIMES:
        return Steps(made, plan, bare, {TAKES_TIMES[kind]: steps})
    return Steps(made, plan, bare, timesteps=() if made.timesteps.tolist() == steps else tuple(steps))


def _not_taken(plan: SamplingPlan) -> str | None:
    """Say why no scheduler of diffusers takes a plan."""
    if any(one.expert == "teacher" for one in plan.jumps):
        return "this one has steps of the teacher"
    if any(one.extrapolates for one in plan.jumps):
        return "this one follows the semantic expert beyond its phase"
    if plan.path == "renoise" and len(plan.jumps) > 1 and plan.boundary is not None:
        return "here two experts re-noise, each within its phase: pipeline_path=deterministic goes straight"
    return None


def _flow_steps(kind: str, grid: TimeGrid, plan: SamplingPlan, renoises: bool) -> Steps:
    made: Any = FlowMatchLCMScheduler if renoises else FlowMatchEulerDiscreteScheduler
    count, times = len(plan.jumps), [one.t for one in plan.jumps]
    ends_early = kind in TAKES_TIMES

    def times_of(scheduler: Any) -> tuple[float, ...]:
        """As the pipeline's own call sets them."""
        own = np.linspace(1.0, 0.0, count + 1)[:-1] if ends_early else None
        scheduler.set_timesteps(count, sigmas=own)
        return tuple(scheduler.sigmas.double()[:-1].tolist())

    scheduler = fit_flow(made, times, plan.boundary, times_of) or made(shift=grid.shift)
    given = {TAKES_TIMES[kind]: times} if kind in TAKES_TIMES else {}
    return Steps(scheduler, plan, times_of(scheduler), given)


def fit_flow(
    made: Any, times: Sequence[float], boundary: float | None, times_of: Callable[[Any], Sequence[float]]
) -> Any | None:
    """Fit a flow scheduler's two numbers, `shift` and `shift_terminal`, to the times where steps start.

    times_of: the times that a pipeline gets of a scheduler. The last start is met exactly, and so is the
    boundary, which a jump must not cross; without one, or where it is the last start, the middle one. So up
    to three steps are met whole. None where the two numbers cannot do it.
    """
    if len(times) == 1:
        return made(shift=1.0)
    terminal = {"shift_terminal": times[-1]}
    if len(times) == 2:
        return made(shift=1.0, **terminal)
    at = next((k for k, t in enumerate(times) if boundary is not None and t <= boundary + SAME_TIME), 0)
    anchor = at if 0 < at < len(times) - 1 else len(times) // 2

    def above(exponent: float) -> float:
        return times_of(made(shift=10.0**exponent, **terminal))[anchor] - times[anchor]

    # Wide shifts also draw the schedule's own end to the noise: only the first root has times apart.
    tried = np.linspace(-WIDEST, WIDEST, 61)
    signs = [above(x) >= 0 for x in tried]
    if signs[0] or not any(signs):
        return None
    k = signs.index(True)
    root = cast(float, brentq(above, tried[k - 1], tried[k], xtol=1e-12))
    return made(shift=10.0**root, **terminal)


def boundary_ratio_of(boundary: float, grid: TimeGrid, times: tuple[float, ...]) -> float:
    """Give WanPipeline's `boundary_ratio`, in the middle of the gap above the boundary.

    It hands times at or above the ratio to the first network, and the boundary is the second one's.
    """
    above = min(t for t in (*grid.nodes, *times) if t > boundary + SAME_TIME)
    return (boundary + above) / 2


def _betas(card: Card) -> list[float]:
    """Betas of the teacher's schedule, all that it does to them included."""
    schedule = schedule_from_dict(card.schedule)
    assert isinstance(schedule, VariancePreserving)
    alphas = torch.tensor((1.0, *schedule.alphas_cumprod), dtype=torch.float64)
    return (1 - alphas[1:] / alphas[:-1]).tolist()


def _plain(card: Card) -> dict[str, Any]:
    """The schedule in a scheduler's words: by its name, or where that does not say all, by its betas."""
    about = dict(card.schedule)
    prediction = {"prediction_type": about.pop("prediction_type")}
    whole = about.keys() <= {"beta_schedule", "beta_start", "beta_end"}
    return prediction | (about if whole else {"trained_betas": _betas(card)})


def _lcm(card: Card) -> Any:
    return LCMScheduler(
        **_plain(card),
        original_inference_steps=card.grid.num_intervals,
        clip_sample=False,
        thresholding=False,
    )


def _dpm(card: Card) -> Any:
    """Of order 1 it is DDIM, and unlike DDIM's own scheduler takes times."""
    return DPMSolverMultistepScheduler(
        **_plain(card),
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=bool(card.schedule.get("rescale_betas_zero_snr", False)),
    )
