"""Steps of the teacher's probability-flow ODE dx/dt = alpha' x0(x, t) + sigma' noise(x, t)."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.consistency.function import jump, move
from raydistill.consistency.schedule import Schedule, over
from raydistill.types import Latents, Text, Times

Field = Callable[[Latents, Times, Text], Latents]
"""prediction(x_t, t, text): what `raydistill.models.protocols.VelocityField` names."""


def guide(cond: Latents, uncond: Latents, guidance_scale: float | Tensor) -> Latents:
    """Classifier-free guidance, uncond + w (cond - uncond) (CFG, eq. 6, whose w is ours minus 1).

    w is a number, or a tensor that broadcasts to the latents.
    """
    return uncond + guidance_scale * (cond - uncond)


def guided(
    field: Field, null_text: Float[Tensor, "l d"], guidance_scale: float, *, batched: bool = True
) -> Field:
    """Make a field guided by `guide`; w = 1 gives the field itself.

    In one pass over twice the batch, or, not `batched`, in two passes as diffusers' WanPipeline does it.
    """
    if guidance_scale == 1:
        return field

    def guided_field(x_t: Latents, t: Times, text: Text) -> Latents:
        null = null_text.to(text).expand_as(text)
        if not batched:
            return guide(field(x_t, t, text), field(x_t, t, null), guidance_scale)
        both = field(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, null]))
        cond, uncond = both.chunk(2)
        return guide(cond, uncond, guidance_scale)

    return guided_field


def guided_by(
    field: Field, null_text: Float[Tensor, "l d"]
) -> Callable[[Latents, Times, Text, Times], Latents]:
    """Make a field guided by a scale w of each sample's own, given with the text; one batched pass."""

    def guided_field(x_t: Latents, t: Times, text: Text, w: Times) -> Latents:
        null = null_text.to(text).expand_as(text)
        cond, uncond = field(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, null])).chunk(2)
        return guide(cond, uncond, over(w, cond))

    return guided_field


def euler(schedule: Schedule, field: Field, x_t: Latents, t: Times, r: Times, text: Text) -> Latents:
    """One Euler step from t to r, order 1 (DDIM on a variance-preserving schedule)."""
    return jump(schedule, field(x_t, t, text), x_t, t, r)


def heun(schedule: Schedule, field: Field, x_t: Latents, t: Times, r: Times, text: Text) -> Latents:
    """One Heun step from t to r, order 2, two passes: x0 and noise averaged over both ends (EDM, alg. 1)."""
    first = field(x_t, t, text)
    x_r = jump(schedule, first, x_t, t, r)
    second = field(x_r, r, text)
    x0 = (schedule.to_x0(first, x_t, t) + schedule.to_x0(second, x_r, r)) / 2
    noise = (schedule.to_noise(first, x_t, t) + schedule.to_noise(second, x_r, r)) / 2
    return move(schedule, x0, noise, x_t, t, r)


METHODS = {"euler": euler, "heun": heun}


def solve(
    schedule: Schedule,
    field: Field,
    x: Latents,
    times: Float[Tensor, " nodes"],
    text: Text,
    method: Literal["euler", "heun"] = "euler",
) -> Latents:
    """Follow the ODE along decreasing times, shared by all samples, and return the state at the last one."""
    step = METHODS[method]
    for k in range(len(times) - 1):
        t, r = (times[i].to(x.device).expand(len(x)) for i in (k, k + 1))
        x = step(schedule, field, x, t, r, text)
    return x
