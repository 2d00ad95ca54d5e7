"""A teacher whose ODE has a closed form: the oracle of the tests.

If every latent is drawn from N(mean, deviation^2), then under x_t = (1 - t) x0 + t noise everything is known:
x_t has mean m_t = (1 - t) mean and deviation S_t = sqrt((1 - t)^2 deviation^2 + t^2), and the ODE
keeps (x - m_t) / S_t.
"""

from dataclasses import dataclass

from torch import Tensor

from raydistill.consistency.phases import Phases
from raydistill.consistency.schedule import over
from raydistill.types import Latents, Text, Times


@dataclass(frozen=True)
class GaussianTeacher:
    """Velocity and exact consistency map for data N(mean, deviation^2) on rectified flow.

    `mean` and `deviation` are numbers, or tensors that broadcast to the latents. deviation 0 is a single
    video, whose paths are straight lines (t = 0 is then excluded: all paths meet there).
    """

    mean: float | Tensor = 0.0
    deviation: float | Tensor = 1.0

    def _moments(self, x: Latents, t: Times) -> tuple[Tensor, Tensor]:
        data, noise = over(1 - t, x), over(t, x)
        return data * self.mean, ((data * self.deviation) ** 2 + noise**2) ** 0.5

    def __call__(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """dx/dt = -mean + (t - (1 - t) deviation^2) / S_t^2 (x_t - m_t); the text is not read."""
        mean_t, deviation_t = self._moments(x_t, t)
        slope = over(t, x_t) - over(1 - t, x_t) * self.deviation**2
        return slope / deviation_t**2 * (x_t - mean_t) - self.mean

    def consistency_map(self, x: Latents, t: Times, r: Times) -> Latents:
        """Where the ODE takes x from t to r: m_r + S_r / S_t (x - m_t)."""
        mean_t, deviation_t = self._moments(x, t)
        mean_r, deviation_r = self._moments(x, r)
        return mean_r + deviation_r / deviation_t * (x - mean_t)


@dataclass(frozen=True)
class GaussianStudent:
    """The perfect student of that teacher: its jump to the end of the phase is the exact map."""

    teacher: GaussianTeacher
    phases: Phases

    def __call__(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Mean velocity from t to the end of its phase; at the very end of the path, the teacher's own."""
        s = self.phases.end(t)
        length = over(t - s, x_t)
        mean_velocity = (x_t - self.teacher.consistency_map(x_t, t, s)) / length.clamp(min=1e-12)
        return mean_velocity.where(length > 0, self.teacher(x_t, t, text))
