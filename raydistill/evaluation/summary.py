"""From records to rows of a table: averages over clips and training seeds, paired across samplers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raydistill.evaluation import intervals
from raydistill.evaluation.candidates import Candidate
from raydistill.evaluation.features import FrechetDistance
from raydistill.evaluation.intervals import Bootstrapped
from raydistill.evaluation.measures import BY_NAME
from raydistill.evaluation.records import Record

CONTROL, ROUND_TRIP = "real clips", "codec round trip"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    group: str
    num_steps: int
    """0 for rows that are no sampler."""
    passes: int
    seconds_per_clip: float
    times: tuple[float, ...]
    """Where each jump starts, and 0: the plan's times."""
    figures: Mapping[str, Bootstrapped]
    teacher: str = "teacher"
    """Name of the teacher that a student is compared with."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for results.json."""
        return {
            "label": self.label,
            "group": self.group,
            "num_steps": self.num_steps,
            "passes": self.passes,
            "seconds_per_clip": self.seconds_per_clip,
            "times": list(self.times),
            "figures": {name: figure.estimate().as_dict() for name, figure in self.figures.items()},
        }


class Summary:
    """Averages records; all rows are resampled with the same clips."""

    def __init__(
        self,
        control: Record,
        real_features: np.ndarray,
        seed: int,
        num_draws: int,
        distance: str | None = "frechet",
    ):
        """`control` are real clips in the samplers' number: they give the null and the scale of diversity.

        `distance`: the measure that the distance of features is; None: it is left out.
        """
        self.name = distance
        self.distance = None if distance is None else FrechetDistance(real_features)
        self.weights = intervals.clip_weights(len(control.features), seed, num_draws)
        self.seed = seed
        self.natural_spread = (
            float(control.values["diversity"].mean()) if "diversity" in control.values else 1.0
        )

    def reference(self, label: str, record: Record) -> Row:
        """Row of clips that no sampler made."""
        return Row(label, "reference", 0, 0, 0.0, (), self._figures([record], label))

    def sampler(self, candidates: Sequence[Candidate], records: Sequence[Record]) -> Row:
        """Row of the candidates of one label, one for each training seed."""
        first = candidates[0]
        times = (*(one.t for one in first.plan.jumps), 0.0)
        seconds = float(np.mean([record.seconds_per_clip for record in records]))
        figures = self._figures(records, first.group)
        place = (first.label, first.group, first.num_steps, first.passes, seconds, times)
        return Row(*place, figures, first.teacher)

    def _figures(self, records: Sequence[Record], key: str) -> dict[str, Bootstrapped]:
        figures = dict[str, Bootstrapped]()
        if self.distance is not None and self.name is not None:
            apart = [self.distance.bootstrapped(record.features, self.weights) for record in records]
            draws, values = np.stack([one.draws for one in apart]), [one.value for one in apart]
            figures[self.name] = intervals.over_seeds(values, draws, key, apart[0].num_clips, self.seed)
        for name in records[0].values:
            stacked = np.stack([record.values[name] for record in records])
            if name == "diversity":
                stacked = stacked / self.natural_spread
            figures[name] = intervals.mean(stacked, self.weights, key, self.seed)
        return {name: replace(figure, limits=BY_NAME[name].limits) for name, figure in figures.items()}


def rows_of(
    summary: Summary, candidates: Sequence[Candidate], records: Mapping[str, Record]
) -> dict[str, Row]:
    """Rows by label, in the order of the candidates."""
    together: dict[str, list[Candidate]] = {}
    for one in candidates:
        together.setdefault(one.label, []).append(one)
    return {
        label: summary.sampler(same, [records[one.name] for one in same]) for label, same in together.items()
    }
