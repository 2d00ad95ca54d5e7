"""Noise schedules and grids of times.

Conventions, once for all of raydistill:

* Time t in [0, 1]: 0 is data, 1 is noise. Three times of one sample are always t > r >= s: where it is, one
  teacher step nearer the data, and the end of its phase.
* x_t = alpha(t) x0 + sigma(t) noise. On rectified flow alpha = 1 - t, sigma = t, and the network predicts the
  velocity dx/dt = noise - x0.
* Guidance is uncond + w (cond - uncond), w = 1 is off. DCM's code writes cond + w (cond - uncond): its w is
  ours minus 1.
* Times are float64 tensors of shape (b,), one per sample; only coefficients are cast to the latents' dtype.
  They may stay on the CPU while the latents are on another device: `over` brings coefficients there.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raydistill.errors import InvalidValue
from raydistill.types import Latents, Times

SAME_TIME = 1e-6
"""Two times nearer than this are one: far above float32's rounding, far below any grid's spacing."""

T = TypeVar("T", float, Tensor)


def over(coefficient: Times, x: Latents) -> Float[Tensor, "b 1 1 1 1"]:
    """Shape one number per sample to multiply latents, in their dtype and on their device."""
    return coefficient.to(x).view(-1, 1, 1, 1, 1)


def shift(t: T, by: float) -> T:
    """Warp times towards noise, by t / (1 + (by - 1) t) (SD3, eq. 23); 0 and 1 stay, by = 1 is none.

    Written so that shift(1) is exactly 1 and shift(t, 1) exactly t.
    """
    return by * t / (by * t + (1 - t))


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path x_t = (1 - t) x0 + t noise; the prediction is the velocity noise - x0 (RF, eq. 1)."""

    def alpha(self, t: Times) -> Times:
        """Weight of the data, 1 - t."""
        return 1 - t

    def sigma(self, t: Times) -> Times:
        """Weight of the noise, t."""
        return t

    def add_noise(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        """x_t = (1 - t) x0 + t noise (DCM, eq. 1)."""
        return over(1 - t, x0) * x0 + over(t, x0) * noise

    def to_x0(self, prediction: Latents, x_t: Latents, t: Times) -> Latents:
        """x0 = x_t - t v."""
        return x_t - over(t, x_t) * prediction

    def to_noise(self, prediction: Latents, x_t: Latents, t: Times) -> Latents:
        """The noise, x_t + (1 - t) v."""
        return x_t + over(1 - t, x_t) * prediction

    def to_prediction(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        """Velocity, noise - x0, at every t."""
        return noise - x0


@dataclass(frozen=True)
class VariancePreserving:
    """alpha(t)^2 + sigma(t)^2 = 1, from a table of alphas_cumprod (DDPM, eq. 4; MCM's teachers).

    Timestep k of the table is t = (k + 1) / length, and t = 0 is clean data; between entries alpha^2 is
    linear. `prediction` is what the network gives: the noise ("epsilon"), or alpha noise - sigma x0 ("v"; PD,
    app. D), with which alone the table may end at alpha = 0: the noise says nothing of x0 there.
    """

    alphas_cumprod: tuple[float, ...]
    prediction: Literal["epsilon", "v"] = "epsilon"
    _table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        """Check that noise grows with t. Raises InvalidValue."""
        if self.prediction not in ("epsilon", "v"):
            raise InvalidValue("prediction", self.prediction, "'epsilon' or 'v'")
        table = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        ends = float(table[-1])
        if len(table) < 2 or not bool((table.diff() < 0).all()) or ends < 0:
            raise InvalidValue("alphas_cumprod", f"{len(table) - 1} numbers", "decreasing, in (0, 1)")
        if ends == 0 and self.prediction == "epsilon":
            raise InvalidValue("alphas_cumprod", "ends at 0", "above 0 where the noise is predicted")
        object.__setattr__(self, "_table", table)

    @staticmethod
    def scaled_linear(
        first: float = 0.00085,
        last: float = 0.012,
        length: int = 1000,
        prediction: Literal["epsilon", "v"] = "epsilon",
    ) -> "VariancePreserving":
        """Betas linear in their square root, the latent-diffusion default."""
        betas = torch.linspace(first**0.5, last**0.5, length, dtype=torch.float64) ** 2
        return _from_betas(betas, prediction)

    @staticmethod
    def linear(
        first: float = 0.00085,
        last: float = 0.012,
        length: int = 1000,
        prediction: Literal["epsilon", "v"] = "epsilon",
    ) -> "VariancePreserving":
        """Betas linear themselves (DDPM; AnimateDiff)."""
        betas = torch.linspace(first, last, length, dtype=torch.float64)
        return _from_betas(betas, prediction)

    def with_less_signal(self, by: float, *, zero_terminal: bool = False) -> "VariancePreserving":
        """Divide every signal-to-noise ratio by `by` (SD3, sec. 5.3; CogVideoX: 3 and 1), see `shift`.

        `zero_terminal`: then move alpha linearly so that it ends at 0 (ZTSNR, alg. 1). Raises InvalidValue.
        """
        if not by > 0:
            raise InvalidValue("snr_shift_scale", by, "above 0")
        alphas = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        alphas = alphas / (by + (1 - by) * alphas)
        if zero_terminal:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        return VariancePreserving(tuple(float(x) for x in alphas), self.prediction)

    def _alpha2(self, t: Times) -> Times:
        table = self._table.to(t.device)
        place = t.double().clamp(0, 1) * (len(table) - 1)
        low = place.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], place - low)

    def alpha(self, t: Times) -> Times:
        """Weight of the data, sqrt(alphas_cumprod)."""
        return self._alpha2(t).sqrt()

    def sigma(self, t: Times) -> Times:
        """Weight of the noise, sqrt(1 - alphas_cumprod)."""
        return (1 - self._alpha2(t)).sqrt()

    def add_noise(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        """x_t = alpha x0 + sigma noise (DDPM, eq. 4)."""
        return over(self.alpha(t), x0) * x0 + over(self.sigma(t), x0) * noise

    def to_x0(self, prediction: Latents, x_t: Latents, t: Times) -> Latents:
        """(x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
        alpha, sigma = over(self.alpha(t), x_t), over(self.sigma(t), x_t)
        if self.prediction == "v":
            return alpha * x_t - sigma * prediction
        return (x_t - sigma * prediction) / alpha

    def to_noise(self, prediction: Latents, x_t: Latents, t: Times) -> Latents:
        """Eps itself, or sigma x_t + alpha v."""
        if self.prediction == "v":
            return over(self.sigma(t), x_t) * x_t + over(self.alpha(t), x_t) * prediction
        return prediction

    def to_prediction(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        """What a network that knew x0 and noise would give."""
        if self.prediction == "v":
            return over(self.alpha(t), x0) * noise - over(self.sigma(t), x0) * x0
        return noise


def _from_betas(betas: Tensor, prediction: Literal["epsilon", "v"]) -> VariancePreserving:
    return VariancePreserving(tuple(float(x) for x in (1 - betas).cumprod(0)), prediction)


Schedule = RectifiedFlow | VariancePreserving

RECTIFIED_FLOW = RectifiedFlow()


def diffuse(x_s: Latents, noise: Latents, t: Times, s: Times, schedule: Schedule = RECTIFIED_FLOW) -> Latents:
    """Take x_s forward to t > s with the exact variance: a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) noise.

    a = alpha_t / alpha_s; x_t then has the law of x0 noised to t at once (DDPM, eq. 2-4).
    t = s changes nothing.
    """
    scale = schedule.alpha(t) / schedule.alpha(s)
    spread = (schedule.sigma(t) ** 2 - (scale * schedule.sigma(s)) ** 2).clamp(min=0).sqrt()
    return over(scale, x_s) * x_s + over(spread, x_s) * noise


def renoise(x_s: Latents, noise: Latents, t: Times, s: Times) -> Latents:
    """Take x_s to t >= s along the straight line, [(1 - t) x_s + (t - s) noise] / (1 - s) (PCM; DCM's code).

    What DCM's critic sees. Its noise is a little too small beside `diffuse`: at most 5 % on DCM's grid.
    """
    return (over(1 - t, x_s) * x_s + over(t - s, x_s) * noise) / over(1 - s, x_s)


@dataclass(frozen=True)
class TimeGrid:
    """The teacher's times: num_intervals even steps from noise to data, shifted, the last one set to `last`.

    Node k is shift((N - k) / N), and node N is `last`. DCM counts from the data, as
    i = N - 1 - k.
    """

    num_intervals: int
    shift: float = 1.0
    last: float = 0.0

    def __post_init__(self):
        """Check ranges. Raises InvalidValue."""
        if self.num_intervals < 1:
            raise InvalidValue("num_intervals", self.num_intervals, "at least 1")
        if not 0 < self.shift < float("inf"):
            raise InvalidValue("shift", self.shift, "a positive number")
        before_last = shift(1 / self.num_intervals, self.shift)
        if not 0 <= self.last < before_last:
            raise InvalidValue("last", self.last, f"in [0, {before_last:.6g}), below the node before it")

    @property
    def nodes(self) -> tuple[float, ...]:
        """The N + 1 nodes, decreasing from 1 to `last`."""
        count = self.num_intervals
        return (*(shift(k / count, self.shift) for k in range(count, 0, -1)), float(self.last))

    @property
    def times(self) -> Float[Tensor, " nodes"]:
        """The same as a tensor, float64."""
        return torch.tensor(self.nodes, dtype=torch.float64)

    def interval(self, index: Int[Tensor, " b"]) -> tuple[Times, Times]:
        """Ends (t, r) of intervals 0 (at the noise) to N - 1 (at the data); r is one teacher step below t."""
        times = self.times.to(index.device)
        return times[index], times[index + 1]

    def node(self, t: float) -> int:
        """Index of the node at t. Raises InvalidValue, naming the nearest nodes, if there is none."""
        times = self.nodes
        nearest = min(range(len(times)), key=lambda k: abs(times[k] - t))
        if abs(times[nearest] - t) < SAME_TIME:
            return nearest
        near = " and ".join(f"{x:.9g}" for x in sorted(times, key=lambda x: abs(x - t))[:2])
        raise InvalidValue("time", t, f"a node of the grid; the nearest are {near}")

    def snap(self, t: float) -> float:
        """Return the exact time of the node at t, as `node` finds it."""
        return self.nodes[self.node(t)]

    def intervals_in(self, upper: float, lower: float) -> range:
        """Indices of the intervals inside [lower, upper]; both must be nodes. Raises InvalidValue."""
        return range(self.node(upper), self.node(lower))


DCM_GRID = TimeGrid(50, shift=17.0, last=shift(0.001, 17.0))
"""DCM's grid on HunyuanVideo: 50 Euler steps at shift 17, ending at 0.016732 and not at 0."""
