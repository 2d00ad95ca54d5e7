"""Bootstrap intervals: what a figure would have been on other clips and other training seeds.

Every sampler sees the same captions and noise, so clip i of one is clip i of another. All figures of a
comparison are therefore resampled with the *same* clips: their differences and ratios are paired without
further care.

Several students of one kind are averaged, and both levels are resampled: clips (shared by all students) and
students. Resampling a handful of students alone would claim too much: with three, its 95 % interval holds the
truth 75 % of the time. Their part is therefore stretched, by sqrt(k / (k - 1)) for what drawing k of k with
replacement loses in spread, and by Student's t over the normal quantile for a spread estimated from k numbers
(seen to cover 93 to 95 %). With one student the interval is over clips alone, and `num_seeds` says so.

A share of exactly 0 or 1 gets an interval without width: no resampling shows what was never seen. Read it as
"within 3 / n" (the rule of three).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
NUM_DRAWS = 400
NORMAL = 1.960
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles for 1, 2, ... degrees of freedom; more students than ten count as ten."""
Clips = Float[np.ndarray, " n"]
Draws = Float[np.ndarray, " draws"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    num_clips: int
    num_seeds: int = 1
    """Trained students behind the figure; with 1 the interval does not cover training."""

    def as_dict(self) -> dict[str, float | int]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bootstrapped:
    """A figure and what it was on each resampling; draw k of every figure used the same clips."""

    value: float
    draws: Draws
    num_clips: int
    num_seeds: int = 1

    def estimate(self) -> Estimate:
        """Percentile interval."""
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(self.draws, [tail, 100 - tail])
        return Estimate(self.value, float(low), float(high), self.num_clips, self.num_seeds)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    key = hashlib.sha256(f"raydistill/intervals/{seed}/{purpose}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def clip_weights(num_clips: int, seed: int = 0, num_draws: int = NUM_DRAWS) -> Float[np.ndarray, "draws n"]:
    """Share of each clip in each resampling with replacement; rows sum to 1."""
    counts = _generator(seed, "clips").multinomial(
        num_clips, np.full(num_clips, 1 / num_clips), size=num_draws
    )
    return counts / num_clips


def over_seeds(
    values: Sequence[float], draws: Float[np.ndarray, "seeds draws"], key: str, num_clips: int, seed: int = 0
) -> Bootstrapped:
    """Average students of different training seeds; `key` names their kind, whose figures stay paired."""
    count, num_draws = draws.shape
    together = draws.mean(axis=0)
    if count > 1:
        drawn = _generator(seed, f"seeds/{key}").integers(count, size=(num_draws, count))
        picked = np.take_along_axis(draws.T, drawn, axis=1).mean(axis=1)
        together = together + _stretch(count) * (picked - together)
    return Bootstrapped(float(np.mean(values)), together, num_clips, count)


def _stretch(count: int) -> float:
    t = STUDENT_T[min(count, len(STUDENT_T) + 1) - 2]
    return t / NORMAL * (count / (count - 1)) ** 0.5


def mean(
    values: Float[np.ndarray, "seeds n"], weights: Float[np.ndarray, "draws n"], key: str = "", seed: int = 0
) -> Bootstrapped:
    """Mean over clips and seeds of per-clip values; a single student may be given as (n,)."""
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    return over_seeds(values.mean(axis=1).tolist(), values @ weights.T, key, values.shape[1], seed)


def difference(a: Bootstrapped, b: Bootstrapped) -> Bootstrapped:
    """Paired a - b."""
    return _combine(a, b, np.subtract)


def ratio(a: Bootstrapped, b: Bootstrapped) -> Bootstrapped:
    """Paired a / b."""
    return _combine(a, b, np.divide)


def transform(a: Bootstrapped, how: Callable) -> Bootstrapped:
    """Apply a function of numbers and arrays to a figure and its draws."""
    return Bootstrapped(float(how(a.value)), how(a.draws), a.num_clips, a.num_seeds)


def _combine(a: Bootstrapped, b: Bootstrapped, how: Callable) -> Bootstrapped:
    if (a.num_clips, len(a.draws)) != (b.num_clips, len(b.draws)):
        raise ValueError(
            f"not paired: {a.num_clips} clips x {len(a.draws)} draws, {b.num_clips} x {len(b.draws)}"
        )
    return Bootstrapped(
        float(how(a.value, b.value)), how(a.draws, b.draws), a.num_clips, min(a.num_seeds, b.num_seeds)
    )


def median(values: Sequence[float], seed: int = 0, num_draws: int = NUM_DRAWS) -> Bootstrapped:
    """Median of repeated timings, resampling rounds: the same ones for equal counts, so ratios are paired."""
    timings = np.asarray(values, dtype=np.float64)
    drawn = _generator(seed, "rounds").integers(len(timings), size=(num_draws, len(timings)))
    return Bootstrapped(float(np.median(timings)), np.median(timings[drawn], axis=1), len(timings))
