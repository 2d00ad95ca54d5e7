"""The consistency function f(x_t, t -> s): where the straight line of one prediction leads."""

import torch

from raydistill.consistency.schedule import Schedule, over
from raydistill.types import Latents, Times


def move(schedule: Schedule, x0: Latents, noise: Latents, x_t: Latents, t: Times, s: Times) -> Latents:
    """Go from t to s with given x0 and noise: x_t + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) noise.

    Equals alpha_s x0 + sigma_s noise (DDIM, eq. 12 with eta = 0) as x_t = alpha_t x0 + sigma_t noise; written
    as a difference, so that s = t gives exactly x_t on every schedule.
    """
    data = over(schedule.alpha(s) - schedule.alpha(t), x_t)
    return x_t + data * x0 + over(schedule.sigma(s) - schedule.sigma(t), x_t) * noise


def reach(schedule: Schedule, t: Times, s: Times) -> Times:
    """How far a unit of the network's prediction moves f(x_t, t -> s), per sample, float64 (b,).

    t - s on rectified flow; alpha_s sigma_t / alpha_t - sigma_s where noise is predicted, and
    alpha_s sigma_t - sigma_s alpha_t where v is.
    """
    t, s = t.double(), s.double()
    one = torch.ones(len(t), 1, 1, 1, 1, dtype=torch.float64, device=t.device)
    return jump(schedule, one, torch.zeros_like(one), t, s).flatten().abs()


def jump(schedule: Schedule, prediction: Latents, x_t: Latents, t: Times, s: Times) -> Latents:
    """Consistency function f(x_t, t -> s) of a network's prediction at (x_t, t) (CM, eq. 5; PCM, eq. 7).

    On rectified flow it is x_t + (s - t) v, DCM's Euler-like step; on a variance-preserving schedule a DDIM
    step. f(x, t -> t) = x holds by construction.
    """
    x0, noise = schedule.to_x0(prediction, x_t, t), schedule.to_noise(prediction, x_t, t)
    return move(schedule, x0, noise, x_t, t, s)
