"""Bootstrap intervals: what a figure would have been on other clips and other training seeds.

Every sampler sees the same captions and noise, so clip i of one is clip i of another. All figures of a
comparison are therefore resampled with the *same* clips: their differences and ratios are paired without
further care.

Several students of one kind are averaged, and both levels are resampled: clips (shared by all students) and
students. Resampling a handful of students alone would claim too much: with three, its 95 % interval holds the
truth 75 % of the time. Their part is therefore stretched, by sqrt(k / (k - 1)) for what drawing k of k with
replacement loses in spread, and by Student's t over the normal quantile for a spread known from k numbers.
A comparison of two kinds has the degrees of freedom of both (Welch's formula), so the stretch is left to the
last moment. With one student the interval is over clips alone, and `num_seeds` says so.

A share of exactly 0 or 1 gets an interval without width: no resampling shows what was never seen. Read it as
"within 3 / n" (the rule of three); `of_shares` gives a difference of such shares that width.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
NUM_DRAWS = 400
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
    """On other clips, the students being these."""
    num_clips: int
    num_seeds: int = 1
    others: Draws | None = None
    """On other clips and with other students; None with one student, whose spread is unknown."""
    dof: float = math.inf
    """Degrees of freedom of the students' part."""
    kinds: frozenset[str] = frozenset()
    """Whose students were drawn."""
    limits: tuple[float, float] = (-math.inf, math.inf)
    """What is possible; a stretched interval does not go beyond."""

    @property
    def drawn(self) -> Draws:
        """`others` where there are any."""
        return self.draws if self.others is None else self.others

    def estimate(self) -> Estimate:
        """Percentile interval."""
        tail = 50 * (1 - LEVEL)
        stretched = self.draws + _stretch(self.dof) * (self.drawn - self.draws)
        ends = np.clip(np.percentile(stretched, [tail, 100 - tail]), *self.limits)
        low, high = (round(float(end), 12) for end in ends)  # a rounding error beside 0 would decide a claim
        return Estimate(self.value, low, high, self.num_clips, self.num_seeds)


def _stretch(dof: float) -> float:
    """Student's t over the normal quantile."""
    quantile = (1 + LEVEL) / 2
    return float(stats.t.ppf(quantile, dof) / stats.norm.ppf(quantile))


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
    together, value = draws.mean(axis=0), float(np.mean(values))
    if count == 1:
        return Bootstrapped(value, together, num_clips)
    drawn = _generator(seed, f"seeds/{key}").integers(count, size=(num_draws, count))
    picked = np.take_along_axis(draws.T, drawn, axis=1).mean(axis=1)
    others = together + (count / (count - 1)) ** 0.5 * (picked - together)
    return Bootstrapped(value, together, num_clips, count, others, count - 1, frozenset({key}))


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
    others = None if a.others is None else how(a.others)
    return replace(
        a, value=float(how(a.value)), draws=how(a.draws), others=others, limits=Bootstrapped.limits
    )


def of_shares(apart: Estimate, scale: float = 1.0) -> Estimate:
    """A difference of shares; where both sides are all or nothing, as wide as what was never seen allows."""
    if apart.low < apart.high:
        return apart
    margin = 3 * scale / apart.num_clips
    return replace(apart, low=apart.low - margin, high=apart.high + margin)


def _combine(a: Bootstrapped, b: Bootstrapped, how: Callable) -> Bootstrapped:
    if (a.num_clips, len(a.draws)) != (b.num_clips, len(b.draws)):
        raise ValueError(
            f"not paired: {a.num_clips} clips x {len(a.draws)} draws, {b.num_clips} x {len(b.draws)}"
        )
    draws = how(a.draws, b.draws)
    none = a.others is None and b.others is None
    apart = [float(np.var(one - draws)) for one in (how(a.drawn, b.draws), how(a.draws, b.drawn))]
    return Bootstrapped(
        float(how(a.value, b.value)),
        draws,
        a.num_clips,
        min(a.num_seeds, b.num_seeds),
        None if none else how(a.drawn, b.drawn),
        _dof((a, apart[0]), (b, apart[1])),
        a.kinds | b.kinds,
    )


def _dof(*sides: tuple[Bootstrapped, float]) -> float:
    """Degrees of freedom of the students' part of two figures, whose variances are given (Welch)."""
    (a, _), (b, _) = sides
    if a.kinds & b.kinds:  # the same students on both sides: they were drawn together
        return min(a.dof, b.dof)
    whole, parts = sum(v for _, v in sides), sum(v**2 / one.dof for one, v in sides)
    return whole**2 / parts if parts else math.inf


def median(values: Sequence[float], seed: int = 0, num_draws: int = NUM_DRAWS) -> Bootstrapped:
    """Median of repeated timings, resampling rounds: the same ones for equal counts, so ratios are paired."""
    timings = np.asarray(values, dtype=np.float64)
    drawn = _generator(seed, "rounds").integers(len(timings), size=(num_draws, len(timings)))
    return Bootstrapped(float(np.median(timings)), np.median(timings[drawn], axis=1), len(timings))
