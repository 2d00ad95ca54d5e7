"""The student's times as a scheduler of diffusers takes them, and our own plan at the very same times."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
"""Argument of a pipeline's call that holds the times; the others have what their scheduler's config says."""
WIDEST = 3.0
"""Power of ten of the largest shift, and of the inverse of the smallest, that a fit may take."""


@dataclass(frozen=True)
class Steps:
    """How a pipeline takes a student's steps."""

    scheduler: Any
    """Of diffusers, as it is saved with the pipeline."""
    plan: SamplingPlan
    """Ours at the times that the scheduler has."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the pipeline's call is given beside the number of steps."""

    @property
    def times(self) -> tuple[float, ...]:
        """Where the steps start, decreasing from 1."""
        return tuple(one.t for one in self.plan.jumps)


def steps_of(kind: str, card: Card, plan: SamplingPlan, name: str) -> Steps:
    """Give the scheduler with which the pipeline `kind`, a class of diffusers, takes the steps of a plan.

    Wan's pipelines take no times: their scheduler is fitted, see `fit_flow`. All others have the plan's own.
    Re-noising schedulers (LCM) noise the predicted clean data, so the plan that comes back ends at 0 even
    where the stored one was trained to end at `last`. Raises InvalidValue for a plan that no scheduler takes:
    with steps of the teacher, an extrapolating jump, two experts that re-noise, a U-Net's deterministic one.
    """
    if why := _not_taken(plan):
        raise _refused(kind, name, why)
    renoises = plan.path == "renoise" and len(plan.jumps) > 1
    if renoises:
        plan = plan_times((*(one.t for one in plan.jumps), 0.0), None, 0.0, "renoise")
    if not card.schedule:
        return _flow_steps(kind, plan, renoises)
    steps = [round(1000 * one.t) - 1 for one in plan.jumps]
    if kind in TAKES_TIMES:
        return Steps(_lcm(card) if renoises else _dpm(card), plan, {TAKES_TIMES[kind]: steps})
    if len(steps) > 1 and not renoises:
        raise _refused(kind, name, "it takes no times, and its schedulers have LCM's, which re-noises")
    made = _lcm(card)
    made.set_timesteps(len(steps))
    if made.timesteps.tolist() != steps:
        why = f"LCM's scheduler has timesteps {made.timesteps.tolist()}, the plan {steps}"
        raise _refused(kind, name, why)
    return Steps(made, plan)


def _not_taken(plan: SamplingPlan) -> str | None:
    """Say why no scheduler of diffusers takes a plan."""
    if any(one.expert == "teacher" for one in plan.jumps):
        return "this one has steps of the teacher"
    if any(one.extrapolates for one in plan.jumps):
        return "this one follows the semantic expert beyond its phase"
    if plan.path == "renoise" and len(plan.jumps) > 1 and plan.boundary is not None:
        return "in this one two experts re-noise, each within its phase"
    return None


def _refused(kind: str, name: str, why: str) -> InvalidValue:
    return InvalidValue("pipeline_plan", name, f"a plan that diffusers' {kind} can take: {why}")


def _flow_steps(kind: str, plan: SamplingPlan, renoises: bool) -> Steps:
    made: Any = FlowMatchLCMScheduler if renoises else FlowMatchEulerDiscreteScheduler
    if kind in TAKES_TIMES:
        times = [one.t for one in plan.jumps]
        return Steps(made(shift=1.0), plan, {TAKES_TIMES[kind]: times})
    scheduler = fit_flow(made, plan)
    scheduler.set_timesteps(len(plan.jumps))
    found = tuple(float(sigma) for sigma in scheduler.sigmas.double()[:-1])
    times = tuple(_exactly(t, plan.boundary) for t in found)
    return Steps(scheduler, plan_times((*times, 0.0), plan.boundary, plan.last, plan.path))


def _exactly(t: float, boundary: float | None) -> float:
    """Give the boundary for what float32 made of it."""
    return boundary if boundary is not None and abs(t - boundary) < SAME_TIME else t


def fit_flow(made: Any, plan: SamplingPlan) -> Any:
    """Fit a flow scheduler's two numbers, `shift` and `shift_terminal`, to a plan's times.

    The last start is met exactly, and so is the boundary, which a jump must not cross; without one, or where
    it is the last start, the middle one. So up to three steps are met whole. Raises InvalidValue where the
    two numbers cannot do it.
    """
    times, boundary = [one.t for one in plan.jumps], plan.boundary
    if len(times) == 1:
        return made(shift=1.0)
    terminal = {"shift_terminal": times[-1]}
    if len(times) == 2:
        return made(shift=1.0, **terminal)
    at = next((k for k, t in enumerate(times) if boundary is not None and t <= boundary + SAME_TIME), 0)
    anchor = at if 0 < at < len(times) - 1 else len(times) // 2

    def above(exponent: float) -> float:
        scheduler = made(shift=10.0**exponent, **terminal)
        scheduler.set_timesteps(len(times))
        return float(scheduler.sigmas[anchor]) - times[anchor]

    # Wide shifts also draw the schedule's own end to the noise: only the first root has times apart.
    tried = np.linspace(-WIDEST, WIDEST, 61)
    signs = [above(x) >= 0 for x in tried]
    if signs[0] or not any(signs):
        where = f"times whose number {anchor} lies where a shifted schedule can have it"
        raise InvalidValue("pipeline_plan", [round(t, 6) for t in times], where)
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
