"""Honest counting: every input file is kept, filtered or quarantined with a reason; the sum is checked."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raydistill.errors import PrepareError

LEFT_OUT = "left_out.jsonl"
"""Beside the manifest: the files that gave no clip, with outcome and reason code."""


@dataclass
class Tally:
    """What became of the input files so far."""

    inputs: int
    """Files listed."""
    max_bad_fraction: float = 1.0
    max_bad_in_a_row: int = 100
    allowed_bad_files: int = 0
    where: str = ""
    """Folder of the artifact, for messages."""
    kept: int = 0
    clips: int = 0
    video_s: float = 0.0
    """Seconds of video in the clips."""
    fallbacks: int = 0
    """Kept files in which decord failed and PyAV stood in."""
    filtered: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    bad_in_a_row: int = 0
    clips_before: int = 0
    """Clips that an earlier run made."""

    def add(
        self,
        outcomes: Iterable[tuple[str, str]],
        clips: int = 0,
        video_s: float = 0.0,
        *,
        neighbours: bool = True,
    ) -> None:
        """Count files by (outcome, reason), then stop the run if too many are bad: PrepareError.

        Of files that are no `neighbours` in the listing none is "in a row" with the next.
        """
        for outcome, reason in outcomes:
            self.bad_in_a_row = self.bad_in_a_row + 1 if outcome == "quarantined" and neighbours else 0
            if outcome == "clip":
                self.kept += 1
            else:
                {"filtered": self.filtered, "quarantined": self.quarantined}[outcome][reason] += 1
            if self.bad_in_a_row >= self.max_bad_in_a_row:
                raise self._too_many(f"{self.bad_in_a_row} bad files in a row", "max_bad_in_a_row")
        self.clips += clips
        self.video_s += video_s
        if self.bad > max(self.allowed_bad_files, self.max_bad_fraction * self.inputs):
            share = f"{self.bad} of {self.inputs} files are bad, more than {self.max_bad_fraction:.1%}"
            raise self._too_many(share, "max_bad_fraction")

    def add_shard(self, facts: Mapping[str, Any]) -> None:
        """Count a committed shard from its manifest's facts."""
        outcomes = [(outcome, reason) for _, _, outcome, reason in facts["files"]]
        self.fallbacks += facts["fallbacks"]
        self.add(outcomes, facts["clips"], facts["video_s"])

    @property
    def bad(self) -> int:
        """Files in quarantine."""
        return self.quarantined.total()

    @property
    def seen(self) -> int:
        """Files with an outcome."""
        return self.kept + self.filtered.total() + self.bad

    def require_complete(self) -> None:
        """Check inputs = kept + filtered + quarantined, and that something was kept."""
        if self.seen != self.inputs:
            raise AssertionError(f"{self.inputs} inputs, but {self.seen} outcomes: {self.counts()}")
        if not self.clips:
            why = self.reasons() or "no reasons"
            advice = ""
            if self.filtered["missing_caption"] == self.seen:
                advice = (
                    ": put NAME.txt or NAME.json beside each file, or set source.captions, "
                    "or source.caption_policy=empty"
                )
            elif self.bad:
                advice = f"; see {self.where}/quarantine"
            raise PrepareError(f"none of {self.inputs} files gave a clip: {why}{advice}")

    def counts(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "inputs": self.inputs,
            "kept": self.kept,
            "filtered": dict(sorted(self.filtered.items())),
            "quarantined": dict(sorted(self.quarantined.items())),
            "clips": self.clips,
            "video_s": round(self.video_s, 3),
            "fallbacks": self.fallbacks,
        }

    def summary(self) -> str:
        """Return the accounting in one line, and where to look for what was left out in another."""
        left, bad = self.filtered.total(), self.bad
        line = f"{self.inputs} files = {self.kept} kept + {left} filtered + {bad} quarantined"
        return (
            line
            + (f"\nleft out: {self.reasons()}; which, see {self.where}/{LEFT_OUT}" if left + bad else "")
            + (f"; what is bad about them, see {self.where}/quarantine" if bad else "")
            + (f"\n{self.fallbacks} files read by PyAV where decord failed" if self.fallbacks else "")
        )

    def reasons(self) -> str:
        """Return e.g. '3 truncated, 1 timeout, 2 too_short (filtered)'."""
        bad = [f"{count} {reason}" for reason, count in self.quarantined.most_common()]
        left = [f"{count} {reason} (filtered)" for reason, count in self.filtered.most_common()]
        return ", ".join(bad + left)

    def _too_many(self, what: str, key: str) -> PrepareError:
        """Build the error that stops the run."""
        other = " or tolerance.allowed_bad_files" if key == "max_bad_fraction" else ""
        return PrepareError(
            f"{what}: {self.reasons()}. The bad ones are listed in {self.where}/quarantine. Mend or "
            f"remove them, or raise tolerance.{key}{other}; what is finished is kept."
        )
