"""Who takes part: the teacher at several step counts, students of several kinds and seeds, mixtures."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from jaxtyping import Float
from torch import Tensor

from raydistill.artifacts import tree_digest
from raydistill.config.evaluate import EvaluateConfig
from raydistill.consistency.schedule import Schedule, TimeGrid
from raydistill.errors import InvalidValue, MissingArtifact, SamplingError, StaleArtifact
from raydistill.evaluation.networks import APART, TEACHER, OnDemand, Part, Shelf, student_part, teacher_part
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import embeds_guidance, load_schedule, schedule_from_dict
from raydistill.sampler import Path, SamplingPlan, teacher_plan, with_head, with_tail
from raydistill.student import Card, Student, read_card

TWO_PASSES = "{} with two passes a step"
TAIL, HEAD = "semantic + teacher tail", "teacher head + detail"


def is_teacher(group: str) -> bool:
    """Whether that is config.teacher, or one of config.more_teachers."""
    return group == TEACHER or group.startswith(f"{TEACHER}_")


@dataclass(frozen=True)
class Candidate:
    """One sampler: networks and the plan they follow."""

    group: str
    """Kind of sampler; a line of the plot."""
    label: str
    """Row of the table. Candidates of one label differ in their training seed alone and are averaged."""
    plan: SamplingPlan
    fields: Mapping[str, VelocityField]
    schedule: Schedule
    weights: Mapping[str, Any]
    """What identifies the networks, for fingerprints."""
    guided: bool = False
    """Whether a teacher's step is two passes."""
    training_seed: int = 0
    """Number of the student within its kind."""
    teacher: str = TEACHER
    """Name of the teacher that it is, or was distilled from."""

    @property
    def num_steps(self) -> int:
        """Jumps from noise to data."""
        return len(self.plan.jumps)

    @property
    def passes(self) -> int:
        """Network passes per clip."""
        return self.plan.passes(tail_guided=self.guided)

    @property
    def name(self) -> str:
        """Label and training seed, fit for a file name."""
        return f"{re.sub('[^a-z0-9_]+', '-', self.label)}-{self.training_seed}"

    @property
    def needs(self) -> frozenset[str]:
        """What must be loaded for it and nothing else with it; empty where everything stays loaded."""
        fields = self.fields
        return (
            fields.keys_of_parts
            if isinstance(fields, OnDemand) and not fields.shelf.keeps_all
            else frozenset()
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything of the sampler itself that shapes its clips."""
        return {"weights": dict(self.weights), "plan": self.plan.to_dict()}


@dataclass(frozen=True)
class Skipped:
    """Something asked for that could not be measured."""

    what: str
    reason: str


@dataclass(frozen=True)
class Lineup:
    """Candidates in the table's order, and what is missing."""

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    in_two_passes: Candidate | None = None
    """The anchor, guided as diffusers' WanPipeline does it. Timed only: its clips are the anchor's."""

    @property
    def firsts(self) -> tuple[Candidate, ...]:
        """The first student of every row: the one that is timed and shown."""
        return tuple({one.label: one for one in reversed(self.candidates)}.values())[::-1]

    @property
    def anchors(self) -> dict[str, Candidate]:
        """Each teacher's sampler that its students are compared with, by name: the first step count."""
        out = dict[str, Candidate]()
        for one in self.candidates:
            if is_teacher(one.group):
                out.setdefault(one.teacher, one)
        return out

    @property
    def anchor(self) -> Candidate | None:
        """That of config.teacher."""
        return self.anchors.get(TEACHER)


@dataclass(frozen=True)
class _Guide:
    """A guided teacher, with its identity."""

    name: str
    folder: str
    part: Part
    """The field under TEACHER, and the same in two passes under APART."""
    identity: Mapping[str, Any]
    guided: bool
    """Whether a step is two passes."""
    schedule: Schedule


def build_lineup(
    config: EvaluateConfig, null_text: Float[Tensor, "l d"], text: Mapping[str, Any] | None = None
) -> Lineup:
    """Find every network that the config names; each is loaded when it is first asked for.

    `text` is the identity of what embedded the captions; None: the small world's word vectors. Those of
    config.data are loaded for one sampler at a time.
    What is not there is skipped with its reason, or, with config.strict, raised as MissingArtifact; the
    teacher is always needed. Raises StaleArtifact for a student of another teacher, codec or text encoder: it
    would be compared with a stranger.
    """
    shelf = Shelf(keeps_all=not config.data)
    guides = [
        _guide(config, name, folder, null_text)
        for name, folder in {TEACHER: config.teacher, **config.more_teachers}.items()
    ]
    candidates = [_teacher(shelf, guide, n, config.shift) for guide in guides for n in config.teacher_steps]
    skipped = [
        Skipped(kind, f"no {kind} student given (students.{kind})")
        for kind in ("dual", "single")
        if not config.students.get(kind) and set(config.students) <= {"dual", "single"}
    ]
    for kind, folders in config.students.items():
        for seed, folder in enumerate(folders):
            for one in _of_student(config, (kind, seed, folder), guides, text, shelf):
                if isinstance(one, Skipped):
                    skipped.append(one)
                else:
                    candidates.append(one)
    order = {one.label: number for number, one in reversed(list(enumerate(candidates)))}
    ordered = tuple(sorted(candidates, key=lambda one: order[one.label]))
    first = candidates[0] if config.teacher_steps and guides[0].guided and shelf.keeps_all else None
    apart = OnDemand(shelf, {TEACHER: (guides[0].part, APART)})
    twice = first and replace(first, label=TWO_PASSES.format(first.label), fields=apart)
    return Lineup(ordered, tuple(dict.fromkeys(skipped)), twice)


def _guide(config: EvaluateConfig, name: str, folder: str, null_text: Float[Tensor, "l d"]) -> _Guide:
    scale, second = config.guidance_scale, config.guidance_scale_2 or None
    identity = {"teacher": teacher_digest(folder), "guidance_scale": scale}
    identity |= {"guidance_scale_2": second} if second else {}

    twice = not (scale == 1 and second in (None, 1)) and not embeds_guidance(folder)
    part = teacher_part(config, name, folder, null_text)
    return _Guide(name, folder, part, identity, twice, load_schedule(folder))


def _teacher(shelf: Shelf, teacher: _Guide, steps: int, shift: float) -> Candidate:
    plan, name = teacher_plan(steps, TimeGrid(steps, shift)), teacher.name
    return Candidate(
        group=name,
        label=f"{name} {steps}",
        plan=plan,
        fields=OnDemand(shelf, {TEACHER: (teacher.part, TEACHER)}),
        schedule=teacher.schedule,
        weights=teacher.identity,
        guided=teacher.guided,
        teacher=name,
    )


def _of_student(
    config: EvaluateConfig,
    which: tuple[str, int, str],
    guides: Sequence[_Guide],
    text: Mapping[str, Any] | None,
    shelf: Shelf,
) -> Iterator[Candidate | Skipped]:
    """Every sampler that one student, of (kind, number within it, folder), takes part in."""
    kind, seed, folder = which
    try:
        card, plans = read_card(FilePath(folder))
        teacher = _own_teacher(config, folder, card, guides, text)
    except MissingArtifact as missing:
        if config.strict:
            raise
        yield Skipped(f"{kind}, student {seed}", str(missing))
        return
    part = student_part(config, folder, card, teacher.folder)
    of = {name: (part, name) for name in (("semantic",) if card.boundary is None else ("semantic", "detail"))}
    student = Student(card, OnDemand(shelf, of), plans, schedule_from_dict(card.schedule))
    digest = {"student": tree_digest(folder)}
    for label, group, plan in _plans(config, kind, student):
        if isinstance(plan, SamplingError | InvalidValue):
            yield Skipped(label, str(plan))
            continue
        mixed = any(one.expert == TEACHER for one in plan.jumps)
        yield Candidate(
            group=group,
            label=label,
            plan=plan,
            fields=OnDemand(shelf, {**of, TEACHER: (teacher.part, TEACHER)} if mixed else of),
            schedule=student.schedule,
            weights=digest | (dict(teacher.identity) if mixed else {}),
            guided=teacher.guided,
            training_seed=seed,
            teacher=teacher.name,
        )


def _own_teacher(
    config: EvaluateConfig,
    folder: str,
    card: Card,
    guides: Sequence[_Guide],
    text: Mapping[str, Any] | None,
) -> _Guide:
    """Find the teacher that a student was distilled from.

    Refuses to compare it with anything but the path that it was distilled from.
    """
    _require_text(config, folder, card, text)
    asked = card.sources.get("teacher")
    teacher = next((one for one in guides if asked in (None, one.identity["teacher"])), None)
    if teacher is None:
        measured = " or ".join(one.folder for one in guides)
        raise StaleArtifact(f"{folder} was distilled from another teacher than {measured}")
    if card.sources.get("codec") not in (None, codec_digest(config.codec)):
        raise StaleArtifact(f"{folder} makes latents of another codec than {config.codec}")
    own_of = {
        "guidance_scale": card.guidance_scale,
        "guidance_scale_2": card.guidance_scale_2 or 0.0,
        "shift": card.grid.shift,
    }
    for name, own in own_of.items():
        low, high = (card.guidance_range if name == "guidance_scale" else None) or (own, own)
        if not low <= getattr(config, name) <= high:
            raise StaleArtifact(
                f"{folder} was distilled with {name} {own:g}, the teacher is measured with "
                f"{getattr(config, name):g}: set {name}={own:g}"
            )
    return teacher


def _require_text(config: EvaluateConfig, folder: str, card: Card, text: Mapping[str, Any] | None) -> None:
    """Refuse captions that another text encoder embedded; its precision alone may differ."""
    if text is None:
        card.require_word_vectors()
        return
    own, given = ({k: v for k, v in one.items() if k != "precision"} for one in (card.text, text))
    if "kind" in own and any(given.get(name) != value for name, value in own.items()):
        raise StaleArtifact(
            f"{folder} knows captions by another text encoder ({own}) than {config.data} ({given}): prepare "
            "it with the encode.text and encode.text_length of the training"
        )


def _plans(
    config: EvaluateConfig, kind: str, student: Student
) -> Iterable[tuple[str, str, SamplingPlan | SamplingError | InvalidValue]]:
    """(label, group, plan or why there is none)."""
    prefix = "" if kind == "dual" else f"{kind}: "
    card = student.card
    asked = [
        (f"{kind} {steps}{other}", kind + other, partial(_on_path, student, steps, path))
        for path in config.paths
        for other in ["" if path == "stored" else f" {path}"]
        for steps in config.student_steps
    ]
    if card.boundary is not None:
        for what, group, make, counts in (
            ("semantic {} + tail", TAIL, with_tail, config.semantic_tail),
            ("head + detail {}", HEAD, with_head, config.head_detail),
        ):
            mixed = partial(make, boundary=card.boundary, grid=card.grid, path=_stored_path(student))
            asked += [
                (prefix + what.format(steps), prefix + group, partial(mixed, steps)) for steps in counts
            ]
    for label, group, make in asked:
        try:
            yield label, group, make()
        except (SamplingError, InvalidValue) as impossible:
            yield label, group, impossible


def _stored_path(student: Student) -> Path:
    """How the student's own plans are followed, so that its mixtures with the teacher are too."""
    for plan in student.plans.values():
        return plan.path
    return "deterministic"


def _on_path(student: Student, steps: int, path: str) -> SamplingPlan:
    """Take the plan stored with the weights, followed on its own path or on the one asked for."""
    plan = student.plan(steps)
    return plan if path == "stored" else SamplingPlan.from_dict({**plan.to_dict(), "path": path})
