"""What `jobs/ablate.py` takes: one study, a table of variants of one distillation."""

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from raydistill.config.checks import at_least
from raydistill.errors import InvalidValue

SWITCHES = {
    "no-training": "measure what is trained already; what is missing is skipped",
    "update-docs": "copy table and pictures to docs/ablation/NAME",
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A difference to be decided: `left` less `right`, in one measure at one number of steps."""

    left: str = MISSING
    """Name of a variant."""
    right: str = MISSING
    """Name of a variant, or of a teacher: `teacher`, or a name in the evaluation's more_teachers."""
    measure: str = "right/all"
    """Name of a measure, as in results.json."""
    num_steps: int = 4
    """Steps of both; of a teacher, its first step count is taken."""
    margin: float = 0.0
    """How much worse `left` may be and still be called as good, in the measure's printed unit: percent of a
    share. 0 asks whether it is better."""

    def __post_init__(self):
        """Check the range."""
        at_least("compare.margin", self.margin, 0.0)


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Variants of one run, each trained with several seeds, measured together, with intervals over both."""

    name: str = MISSING
    """Of the study: a-z, 0-9 and dashes; names its folder under docs/ablation."""
    question: str = MISSING
    """What the study asks, in a sentence."""
    before: list[str] = field(default_factory=list[str])
    """Jobs that make what the trainings read, as typed after `python`, run in turn: each goes on where it
    stopped, and does nothing where all is made."""
    base: str = MISSING
    """Settings file of jobs/distill.py that every variant starts from."""
    shared: list[str] = field(default_factory=list[str])
    """key=value settings of all variants, after those of the file."""
    variants: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Name -> key=value settings, after the shared ones."""
    seeds: tuple[int, ...] = (7, 8, 9)
    """Training seeds; an interval over fewer than three says little."""
    evaluate: str = MISSING
    """Settings file of jobs/evaluate.py: teacher, codec, judge, clips, steps. Its students are not used."""
    evaluate_shared: list[str] = field(default_factory=list[str])
    """key=value settings after those of that file; teacher_steps=[] leaves the teacher's rows out."""
    columns: list[str] = field(
        default_factory=lambda: [
            "frechet",
            "right/all",
            "path/direction",
            "sharpness",
            "watermark",
            "spectrum",
        ]
    )
    """Measures in the table, all with intervals."""
    compare: list[CompareConfig] = field(default_factory=list[CompareConfig])
    """What the study decides."""
    output: str = MISSING
    """Folder of the report."""
    trainings: str = MISSING
    """Folder of the trainings and the records of their samplers; the same command goes on in it. Studies that
    name the same share them: a training that several ask for is done once."""
    parallel: int = 1
    """Trainings at a time."""

    def __post_init__(self):
        """Check names."""
        if not re.fullmatch("[a-z0-9-]+", self.name):
            raise InvalidValue("name", self.name, "a name of a-z, 0-9 and dashes")
        if not self.variants:
            raise InvalidValue("variants", self.variants, "one or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InvalidValue("seeds", self.seeds, "one or more different seeds")
        at_least("parallel", self.parallel, 1)
        for name, pairs in {"shared": self.shared, **self.variants}.items():
            _check_variant(name, pairs)
        for one in self.compare:
            _check_sides(one, self.variants)
        for command in self.before:
            if not re.match(r"jobs/[a-z]+\.py( |$)", command):
                raise InvalidValue("before", command, "jobs/NAME.py and its arguments")

    def asked(self, variant: str, seed: int) -> list[str]:
        """Return the key=value settings of one training, but for its output."""
        return [*self.shared, *self.variants[variant], f"seed={seed}"]

    @property
    def commands_before(self) -> list[list[str]]:
        """`before` in words."""
        return [shlex.split(one) for one in self.before]

    def as_dict(self) -> dict[str, Any]:
        """Variants as they are shown in the report."""
        return {name: " ".join(pairs) or "(the base)" for name, pairs in self.variants.items()}


def _check_sides(one: CompareConfig, variants: Collection[str]) -> None:
    if one.left == one.right:
        raise InvalidValue("compare", one.left, "two different sides")
    for side in {one.left, one.right} - set(variants):
        if not side.startswith("teacher"):  # which there are, the evaluation's settings say
            raise InvalidValue("compare", side, f"teacher, or one of {', '.join(variants)}")


def _check_variant(name: str, pairs: list[str]) -> None:
    if not re.fullmatch("(?!teacher(_|$))[a-z0-9_]+", name):
        raise InvalidValue("variants", name, "a name of a-z, 0-9, _, that is no teacher's")
    for pair in pairs:
        if "=" not in pair or pair.startswith(("output=", "seed=")):
            raise InvalidValue(f"variants.{name}", pair, "key=value; output and seed are the study's")
