"""A bundle: the folder that a server loads. This side reads its card, without torch.

    bundle.json   written last: what can be asked for, and the sha256 of every other file and of itself
    student/      as in `raydistill/student.py`
    codec/        diffusers' folder of the codec
    teacher/      only where a plan has the teacher's tail, or the student is a LoRA on it
    text/         tokenizers and text encoders of a real teacher's pipeline; word vectors need no files

`export.py` writes it. Whatever decides on a request needs no more than the card.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from raydistill.artifacts import fingerprint, tree_files, write_json
from raydistill.config.checks import at_least
from raydistill.config.export import require_name
from raydistill.errors import ConfigError, CorruptArtifact, InvalidValue, MissingArtifact, StaleArtifact

VERSION = 1
CARD = "bundle.json"
STUDENT, CODEC, TEACHER, TEXT = "student", "codec", "teacher", "text"
"""Folders in a bundle."""


@dataclass(frozen=True, kw_only=True)
class PlanCard:
    """One way of sampling, in `SamplingPlan.to_dict`'s values, and what it costs."""

    version: int
    """Of the plan's form."""
    num_steps: int
    """Jumps from noise to data."""
    passes: int
    """Network passes per sample; a guided teacher's step counts as 2."""
    experts: tuple[str, ...]
    """In the order of first use: `semantic`, `detail`, `teacher`."""
    jumps: list[dict[str, Any]]
    """{t, s, expert, extrapolates} each."""
    path: str
    boundary: float | None
    last: float

    def to_dict(self) -> dict[str, Any]:
        """What `SamplingPlan.from_dict` reads."""
        return {name: getattr(self, name) for name in ("version", "jumps", "path", "boundary", "last")}


@dataclass(frozen=True, kw_only=True)
class ShapeCard:
    """One size of video."""

    frames: int
    height: int
    width: int
    latent: tuple[int, int, int, int]
    """Channels, frames, height, width of its latents."""

    def __str__(self):
        """Width first, as requests have it."""
        return f"{self.width}x{self.height} with {self.frames} frames"


@dataclass(frozen=True, kw_only=True)
class BundleCard:
    """Everything about a bundle but its weights. Raises InvalidValue for values that do not fit together."""

    name: str
    """Under which it is served."""
    kind: str
    """Of the student: 'dual', 'single', 'dual_full' or 'motion'."""
    plans: Mapping[str, PlanCard]
    """By name: '4' is four steps of the student, '2+tail' two and the teacher for the rest. Those whose names
    are numbers come first, by number."""
    default_plan: str
    shapes: tuple[ShapeCard, ...]
    """What may be asked for; the first is what the student was trained on."""
    fps: int
    shift: float
    """Warp of the student's times towards noise; 1 is none."""
    boundary: float | None
    """Time at which the semantic expert hands over; None for a single expert."""
    guidance_scale: float
    """Guidance that was distilled into it; also that of a teacher's tail."""
    text: Mapping[str, Any]
    """Of the text encoder: {"kind": "word_vectors", "version", "num_tokens", "width"}, or a pipeline's
    {"kind", "digest", "length", "precision"}."""
    codec_kind: str
    """Diffusers' class of the codec."""
    sources: Mapping[str, Any]
    """Digests of the student's folder and of what it was made from, and the seed."""
    scores: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plan -> {"num_clips", "num_seeds", "figures": {measure: {"value", "low", "high"}}}: 95 % intervals,
    named and counted as in results.json, where `right/all` is a share. Plans not measured are absent."""
    preview: Mapping[str, Any] | None = None
    """{"matrix": c x 3, "bias": 3, "r2"}: RGB in [-1, 1] of a latent pixel is latents @ matrix + bias."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Relative name -> sha256 of every file but the card."""

    def __post_init__(self):
        """Check what others rely on."""
        require_name(self.name)
        at_least("fps", self.fps, 1)
        if self.default_plan not in self.plans:
            raise InvalidValue("default_plan", self.default_plan, f"one of {', '.join(self.plans)}")
        if not self.shapes:
            raise InvalidValue("shapes", [], "one or more")

    @cached_property
    def digest(self) -> str:
        """Sha256 over the whole card, and so over all files: the bundle's identity."""
        return fingerprint(self._values())

    @property
    def label(self) -> str:
        """Name and the first 12 digits of the digest, `tiny@0123456789ab`."""
        return f"{self.name}@{self.digest[:12]}"

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps that can be asked for."""
        return tuple(int(name) for name in self.plans if name.isdecimal())

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is in it."""
        return any(name.startswith(f"{TEACHER}/") for name in self.files)

    def plan_for(self, steps: int | None = None, plan: str | None = None) -> str:
        """Return the name of the plan for a number of steps or a name, or of the default for neither.

        Raises InvalidValue of `num_inference_steps` or `plan`.
        """
        if plan is not None:
            if plan not in self.plans:
                raise InvalidValue("plan", plan, f"one of {', '.join(self.plans)}")
            if steps not in (None, self.plans[plan].num_steps) and str(steps) != plan:
                has = f"plan '{plan}' has {self.plans[plan].num_steps} steps; give one of the two fields"
                raise InvalidValue("num_inference_steps", steps, has)
            return plan
        if steps is None:
            return self.default_plan
        if str(steps) not in self.plans:
            known = f"one of {', '.join(map(str, self.steps))}" if self.steps else "not given: name a plan"
            if named := [name for name, one in self.plans.items() if one.num_steps == steps]:
                known += f", or plan={' or '.join(named)}"
            raise InvalidValue("num_inference_steps", steps, known)
        return str(steps)

    def shape_for(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> ShapeCard:
        """Return the first size with what is given. Raises InvalidValue of `size` or `num_frames`."""
        sized = [one for one in self.shapes if height in (None, one.height) and width in (None, one.width)]
        if not sized:
            asked = "x".join("any" if side is None else str(side) for side in (width, height))
            sizes = dict.fromkeys(f"{one.width}x{one.height}" for one in self.shapes)
            raise InvalidValue("size", asked, f"one of {', '.join(sizes)}")
        found = next((one for one in sized if frames in (None, one.frames)), None)
        if found is None:
            known = ", ".join(map(str, dict.fromkeys(one.frames for one in sized)))
            raise InvalidValue("num_frames", frames, f"one of {known} at {sized[0].width}x{sized[0].height}")
        return found

    def require_same(
        self,
        plan: str,
        *,
        flow_shift: float | None = None,
        boundary_ratio: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Raise InvalidValue for values that were fixed by distillation, if given and not those.

        Guidance is what was distilled into the student, or 1, as no second pass is made for it; a plan with
        steps of the teacher is guided, and takes the former alone.
        """
        guided = "teacher" in self.plans[plan].experts
        fixed: tuple[tuple[str, float | None, tuple[float, ...]], ...] = (
            ("flow_shift", flow_shift, (self.shift,)),
            ("boundary_ratio", boundary_ratio, () if self.boundary is None else (self.boundary,)),
            (
                "guidance_scale",
                guidance_scale,
                (self.guidance_scale,) if guided else (self.guidance_scale, 1.0),
            ),
        )
        for key, given, allowed in fixed:
            if given is None or any(math.isclose(given, one, rel_tol=1e-6) for one in allowed):
                continue
            known = (
                " or ".join(dict.fromkeys(f"{one:.9g}" for one in allowed)) or "not given: one expert alone"
            )
            raise InvalidValue(
                key, given, f"{known}; '{self.name}' was distilled so, and it cannot be changed"
            )

    def _values(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}


def write_bundle_card(folder: str | Path, card: BundleCard) -> None:
    """Write `bundle.json`: the last act of whoever makes a bundle."""
    write_json(Path(folder) / CARD, {**asdict(card), "version": VERSION, "digest": card.digest})


def read_bundle(folder: str | Path) -> BundleCard:
    """Read and check the card alone; `verify_bundle` reads the other files too.

    Raises MissingArtifact, StaleArtifact (another release's card) or CorruptArtifact (the card differs from
    its own digest).
    """
    path = Path(folder) / CARD
    values, digest = _read_values(path)
    try:
        card = _card_of(values)
    except (TypeError, KeyError, AttributeError, ConfigError) as other:
        raise StaleArtifact(f"{path} is of another release ({other}): export again") from other
    if card.digest != digest:  # the bytes are right, but something of them has no place here
        raise StaleArtifact(f"{path} is of another release: export again")
    return card


def verify_bundle(folder: str | Path) -> BundleCard:
    """Read a bundle's card and every file, which must be the ones that were exported, and no other.

    Names that begin with a dot are not looked at. Raises what `read_bundle` raises; CorruptArtifact names
    files that are missing, changed or not the bundle's.
    """
    card = read_bundle(folder)
    found = tree_files(folder)
    del found[CARD]
    wrong = {
        "missing": sorted(card.files.keys() - found.keys()),
        "changed": sorted(name for name in found if card.files.get(name, found[name]) != found[name]),
        "not the bundle's": sorted(found.keys() - card.files.keys()),
    }
    if told := "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names):
        raise CorruptArtifact(f"{folder} is not as it was exported ({told}): copy the bundle again")
    return card


def in_order(plans: Mapping[str, PlanCard]) -> dict[str, PlanCard]:
    """Plans in the order in which people read them: numbers of steps, then the others by name."""
    return dict(sorted(plans.items(), key=lambda one: (not one[0].isdecimal(), one[1].num_steps, one[0])))


def _read_values(path: Path) -> tuple[dict[str, Any], str]:
    """Read a card's JSON; returns its values and what it says its digest is."""
    try:
        values = json.loads(path.read_bytes())
        version, digest = values.pop("version"), values.pop("digest")
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise MissingArtifact(
            f"no bundle at {path.parent}: {CARD} is missing; jobs/export.py writes it last"
        ) from missing
    except (ValueError, KeyError, AttributeError, TypeError) as broken:
        raise CorruptArtifact(f"{path} is not a whole card ({broken!r}): copy the bundle again") from broken
    if version != VERSION:
        raise StaleArtifact(f"{path} is not of version {VERSION}: export again with this release")
    if digest != fingerprint({"version": version, **values}):
        raise CorruptArtifact(f"{path} differs from its own digest: copy the bundle again")
    return values, digest


def _card_of(values: Mapping[str, Any]) -> BundleCard:
    plans = {
        name: PlanCard(**{**plan, "experts": tuple(plan["experts"])})
        for name, plan in values["plans"].items()
    }
    shapes = tuple(ShapeCard(**{**one, "latent": tuple(one["latent"])}) for one in values["shapes"])
    return BundleCard(**{**values, "plans": in_order(plans), "shapes": shapes})
