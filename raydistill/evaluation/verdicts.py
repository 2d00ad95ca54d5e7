"""What students must show, said as claims with limits, and whether the intervals bear them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from raydistill.evaluation import intervals
from raydistill.evaluation.candidates import TWO_PASSES, Candidate, is_teacher
from raydistill.evaluation.intervals import Bootstrapped, Estimate
from raydistill.evaluation.measures import ALL_RIGHT, BY_NAME
from raydistill.evaluation.summary import CONTROL, ROUND_TRIP, Row

Side = Literal["at most", "at least", "more than", "less than"]
Timings = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds per call, by batch and label."""
Outcome = Literal["held", "not held", "undecided", "skipped"]
BY_FAR = 10.0
"""Points of accuracy that count as worse by far."""
TIMES_FAR = 4.0
"""How many times the Frechet distance counts as worse by far."""


@dataclass(frozen=True)
class Verdict:
    """A claim, its figure, and the outcome: decided only if its whole interval is on one side."""

    claim: str
    limit: float
    side: Side
    unit: str
    figure: Estimate | None = None
    reason: str = ""
    """Why it was skipped, or what to keep in mind."""

    @property
    def outcome(self) -> Outcome:
        """Held, not held, undecided, or skipped."""
        if self.figure is None:
            return "skipped"
        low, high, limit = self.figure.low, self.figure.high, self.limit
        inside, outside = {
            "at most": (high <= limit, low > limit),
            "at least": (low >= limit, high < limit),
            "more than": (low > limit, high <= limit),
            "less than": (high < limit, low >= limit),
        }[self.side]
        return "held" if inside else "not held" if outside else "undecided"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for results.json."""
        figure = self.figure and self.figure.as_dict()
        return {**vars(self), "figure": figure, "outcome": self.outcome}

    @property
    def text(self) -> str:
        """One line, without the outcome."""
        limit = f"{self.side} {self.limit:g}{self.unit}"
        if self.figure is None:
            return f"{self.claim}: {limit}: {self.reason}"
        f = self.figure
        note = f"; {self.reason}" if self.reason else ""
        return f"{self.claim}: {f.value:.3g} [{f.low:.3g}, {f.high:.3g}]{self.unit} ({limit}{note})"


def apart(measure: str, left: Bootstrapped, right: Bootstrapped) -> Estimate:
    """Left less right, in points where it is a share; where 1 is best, of the distances from 1."""
    how = BY_NAME[measure]
    if how.better == "one":
        left, right = (intervals.transform(one, lambda x: abs(x - 1)) for one in (left, right))
    less = intervals.transform(intervals.difference(left, right), lambda x: how.scale * x).estimate()
    return intervals.of_shares(less, how.scale) if how.scale == 100 else less


def said(measure: str, words: str) -> str:
    """What `apart` compares."""
    return f"distance of {words} from 1" if BY_NAME[measure].better == "one" else words


class Judgement:
    """Compares rows of one table."""

    def __init__(
        self,
        rows: Mapping[str, Row],
        anchor: Candidate | None,
        timings: Timings,
        distance: str = "frechet",
    ):
        """`rows` by label; `anchor` the teacher's many-step sampler; `timings` seconds by batch and label.

        `distance`: the measure that is a distance between sets.
        """
        self.rows, self.timings, self.distance = rows, timings, distance
        self.best = anchor.label if anchor else "teacher"

    def all(self) -> list[Verdict]:
        """Every claim, whether or not its rows are there."""
        return [*self._dual(), *self._motion()]

    def of_real(self) -> list[Verdict]:
        """What 4 and 2 steps of a real teacher's students must show, by rows that are there.

        Nearer to the teacher's clips than its own few steps, and than a plain student's: what few-step
        distillation is for. Not asked of motion students, who take their look from elsewhere.
        """
        # Students of another teacher are measured beside its clips, not this one's.
        kinds = dict.fromkeys(row.group for row in self.rows.values() if row.teacher == "teacher")
        students = [kind for kind in kinds if not is_teacher(kind) and f"{kind} 4" in self.rows]
        near = [kind for kind in students if not kind.startswith("motion")]
        claims = [(f"{kind} {n}", f"teacher {n}") for kind in near for n in (4, 2)]
        claims += [(f"dual {n}", f"single {n}") for n in (4, 2) if {"dual", "single"} <= {*near}]
        far, words = "teacher/latent_rmse", f"distance of latents to {self.best}'s"
        out = [
            self._apart(label, other, "less than", 0.0, far, words)
            for label, other in claims
            if label in self.rows and other in self.rows and other != self.best
        ]
        if any(self.distance in row.figures for row in self.rows.values()):
            # So few clips are far from any others: only what lies above real ones' distance says something.
            out += [
                self._frechet_ratio(f"{kind} 4", self.best, "at most", 1.1, less_null=ROUND_TRIP)
                for kind in students
            ]
        return out + [
            self._faster(self.best, f"{kind} 4", batch, 10.0) for batch in self.timings for kind in students
        ]

    def _motion(self) -> list[Verdict]:
        """What MCM's student must show beside the teacher of poor videos."""
        label, best = "motion 4", self.best
        if label not in self.rows:
            return []
        return [
            self._apart(label, best, "less than", 0.0, "sharpness", "sharpness"),
            self._apart(label, best, "less than", 0.0, "watermark", "watermark"),
            self._apart(label, best, "at least", -2.0, "path/direction", "direction of the path right"),
            self._apart(label, best, "at least", -2.0, "right/direction", "direction right by the judge"),
            self._apart(label, best, "at least", -2.0, "right/speed", "speed right by the judge"),
            self._apart(label, best, "at least", -2.0),
        ]

    def _dual(self) -> list[Verdict]:
        """What DCM's two experts must show."""
        best = self.best
        if self.only_motion:
            return []
        return [
            self._frechet_ratio("dual 4", best, "at most", 1.1),
            self._frechet_ratio("dual 4", best, "at most", 1.1, less_null=CONTROL),
            self._apart("dual 4", best, "at least", -2.0),
            self._apart("dual 2", best, "at least", -5.0),
            *(self._apart(f"dual {n}", f"teacher {n}", "at least", BY_FAR) for n in (4, 2)),
            *(self._frechet_ratio(f"dual {n}", f"teacher {n}", "at most", 1 / TIMES_FAR) for n in (4, 2)),
            *(self._apart(f"dual {n}", f"single {n}", "more than", 0.0) for n in (4, 2)),
            *(self._frechet_ratio(f"dual {n}", f"single {n}", "less than", 1.0) for n in (4, 2)),
            *(
                self._faster(slow, "dual 4", batch, 20.0)
                for batch in self.timings or ("1",)
                for slow in (best, TWO_PASSES.format(best))
            ),
        ]

    def _absent(self, labels: Sequence[str], measure: str) -> str:
        gone = [label for label in labels if label not in self.rows]
        if gone:
            return f"{' and '.join(gone)} not measured"
        dumb = [label for label in labels if measure not in self.rows[label].figures]
        return f"no {measure} for {' and '.join(dumb)}" if dumb else ""

    def _frechet_ratio(
        self, label: str, other: str, side: Side, limit: float, *, less_null: str = ""
    ) -> Verdict:
        claim = f"{label}: Frechet over {other}'s" + (", both less real clips'" if less_null else "")
        skipped = partial(Verdict, claim, limit, side, "x", None)
        absent = self._absent([label, other, *([less_null] if less_null else [])], self.distance)
        if absent:
            return skipped(absent)
        above, below = (self.rows[name].figures[self.distance] for name in (label, other))
        if less_null:
            null = self.rows[less_null].figures[self.distance].value
            above, below = (intervals.transform(f, lambda x: x - null) for f in (above, below))
            if below.estimate().low <= 0:
                return skipped(f"{other} is not apart from real clips")
        figure = intervals.ratio(above, below).estimate()
        return Verdict(claim, limit, side, "x", figure, self._seeds(label, other))

    @property
    def only_motion(self) -> bool:
        """Whether motion students are the only ones."""
        kinds = {row.group for row in self.rows.values() if not is_teacher(row.group)} - {"reference"}
        return bool(kinds) and all(kind.startswith("motion") for kind in kinds)

    def _apart(
        self,
        label: str,
        other: str,
        side: Side,
        limit: float,
        measure: str = ALL_RIGHT,
        words: str = "all attributes right",
    ) -> Verdict:
        claim = f"{label}: {said(measure, words)}, less {other}'s"
        unit = " points" if BY_NAME[measure].scale == 100 else ""
        absent = self._absent([label, other], measure)
        if absent:
            return Verdict(claim, limit, side, unit, None, absent)
        figure = apart(measure, *(self.rows[name].figures[measure] for name in (label, other)))
        return Verdict(claim, limit, side, unit, figure, self._seeds(label, other))

    def _faster(self, slow: str, fast: str, batch: str, limit: float) -> Verdict:
        claim = f"latency of {slow} over {fast}, batch {batch}"
        timed = self.timings.get(batch, {})
        absent = [label for label in (slow, fast) if not timed.get(label)]
        if absent:
            return Verdict(claim, limit, "at least", "x", None, f"{' and '.join(absent)} not timed")
        ratio = intervals.ratio(*(intervals.median(timed[label]) for label in (slow, fast)))
        return Verdict(claim, limit, "at least", "x", ratio.estimate(), "over rounds of timing")

    def _seeds(self, *labels: str) -> str:
        students = [self.rows[label] for label in labels if not is_teacher(self.rows[label].group)]
        fewest = min(next(iter(row.figures.values())).num_seeds for row in students)
        return f"{fewest} training seeds" if fewest > 1 else "one training seed: its own spread is not in it"
