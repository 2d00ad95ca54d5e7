"""The exact mix of a run: where the paths of its samples begin, and the images beside them.

Three lanes share the samples: `video` reads clips, `simulated` reads the same clips for their captions alone,
`recorded` reads paths of the teacher. The image lane has a count and an order of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from raydistill import keyed
from raydistill.errors import InvalidValue
from raydistill.trajectories.plan import LONGEST_PERIOD, Plan, Source

VIDEO, SIMULATED, RECORDED, IMAGE = "video", "simulated", "recorded", "image"


@dataclass(frozen=True)
class Rows:
    """What a lane reads: how many rows, and the fingerprint of the artifact that holds them."""

    count: int
    digest: str


@dataclass(frozen=True)
class Intervals:
    """Interval of the teacher's grid that each sample is drawn from, as `Segment.times` draws it."""

    seed: int
    first: int
    count: int

    def __call__(self, indices: Sequence[int]) -> list[int]:
        """Number of the interval, whose upper node has the same number, of each global sample index."""
        return [self.first + k for k in keyed.integers(self.seed, indices, "time", self.count)]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The plan of the samples, and that of the images: both pure functions of an index."""

    plan: Plan
    """Its sources are lanes, by the names above; any other name is read as `video` is."""
    images: Plan | None = None
    """A single source, `image`; its global batch is the images of a step over all workers."""

    @property
    def lanes(self) -> frozenset[str]:
        """Names of all sources."""
        plans = (self.plan, self.images) if self.images else (self.plan,)
        return frozenset(source.name for plan in plans for source in plan.sources)

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps; of a plan without images the same as `Plan.state`."""
        images = {"images": self.images.state(step)} if self.images else {}
        return {**self.plan.state(step), **images}

    def require_divisible(self, world_size: int, micro_batch: int) -> None:
        """Raise InvalidValue unless samples and images divide into workers and micro-batches."""
        share = self.plan.share(world_size)
        if micro_batch < 1 or share % micro_batch:
            raise InvalidValue(
                "micro_batch", micro_batch, f"must divide the {share} samples per worker and step"
            )
        rounds = share // micro_batch
        if self.images and self.images.share(world_size) % rounds:
            count = self.images.global_batch
            parts = f"{world_size} workers x {rounds} micro-batches"
            raise InvalidValue("images_per_step", count, f"must be a multiple of {parts}")


def as_lanes(plan: Lanes | Plan) -> Lanes:
    """A plan alone is one of clips."""
    return plan if isinstance(plan, Lanes) else Lanes(plan=plan)


def build_lanes(
    seed: int,
    global_batch: int,
    video: Rows,
    *,
    real_share: float = 1.0,
    recorded_share: float = 0.0,
    per: Literal["sample", "step"] = "sample",
    recorded: Rows | None = None,
    images: Rows | None = None,
    images_per_step: int = 0,
) -> Lanes:
    """Mix lanes in exact shares: of n samples (or steps) each has its share of n within 1, at every n.

    What real_share and recorded_share leave is simulated. Raises InvalidValue for shares that are none, that
    need an artifact which is not given, or that no short period can keep.
    """
    simulated_share = _rest(real_share, recorded_share)
    if recorded_share > 0 and recorded is None:
        raise InvalidValue("recorded_share", recorded_share, "0, or an artifact of recorded paths")
    if images is not None and images_per_step < 1:
        raise InvalidValue("images_per_step", images_per_step, "at least 1 where there are images")
    weights = ((VIDEO, real_share, video), (SIMULATED, simulated_share, video))
    weights += ((RECORDED, recorded_share, recorded or video),)
    sources = tuple(
        Source(name=name, num_rows=rows.count, weight=weight, digest=rows.digest)
        for name, weight, rows in weights
        if weight > 0
    )
    unit = global_batch if per == "step" else 1
    plan = Plan(seed=seed, global_batch=global_batch, sources=sources, unit=unit)
    if images is None:
        return Lanes(plan=plan)
    source = Source(name=IMAGE, num_rows=images.count, digest=images.digest)
    return Lanes(plan=plan, images=Plan(seed=seed, global_batch=images_per_step, sources=(source,)))


def _rest(*shares: float) -> float:
    """Return what shares leave of 1. Raises InvalidValue.

    They are taken as the fractions they stand for, as a plan takes them: 1/3 and 1/3 leave a third, and 0.7
    and 0.3 leave nothing, not a rounding error that would be a lane.
    """
    if all(0 <= share <= 1 for share in shares):
        rest = 1 - sum(Fraction(share).limit_denominator(LONGEST_PERIOD) for share in shares)
        if rest >= 0:
            return float(rest)
    raise InvalidValue("real_share, recorded_share", shares, "in [0, 1], 1 at most together")
