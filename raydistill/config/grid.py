"""Times of a teacher's path."""

from dataclasses import dataclass

from raydistill.config.checks import at_least, positive
from raydistill.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Times at which the teacher's path is cut; a training example jumps from one node."""

    num_intervals: int = 50
    """Number of teacher steps from noise to data, N, as in DCM. At least 2."""
    shift: float = 1.0
    """Warp of the times towards noise, by * t / (1 + (by - 1) t) (DCM: 17). 1 is none."""
    last: float = 0.0
    """Last node, in [0, boundary). DCM stops at 0.0167, short of clean data."""

    def __post_init__(self):
        """Check ranges."""
        at_least("grid.num_intervals", self.num_intervals, 2)
        positive("grid.shift", self.shift)
        if not 0.0 <= self.last < 1.0:
            raise InvalidValue("grid.last", self.last, "in [0, 1)")
