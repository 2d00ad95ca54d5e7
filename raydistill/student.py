"""The distilled student on disk: weights, how to sample with them, and what they were made from.

A folder: `semantic/` (diffusers' own layout), `detail.safetensors` (what the detail expert adds) or `detail/`
(a whole second network); of a motion student, and of a semantic expert that is a LoRA, instead of `semantic/`
only `pytorch_lora_weights.safetensors`, which diffusers' pipelines load over the teacher;
`null_text.safetensors`, the empty caption by the teacher's own text encoder. And `student.json`, written
last, with the sha256 of every other file and of itself.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.artifacts import fingerprint, tree_files, write_json
from raydistill.consistency.schedule import RECTIFIED_FLOW, Schedule, TimeGrid
from raydistill.errors import CorruptArtifact, MissingArtifact, SamplingError, StaleArtifact, UnknownKey
from raydistill.models.casting import cast_parameters
from raydistill.models.expert import add_detail, load_own_state, own_state
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.models.guidance import guide_teacher
from raydistill.models.lora import load_lora, merge, save_lora
from raydistill.models.pair import PairField
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import Teacher, load_teacher, load_whole_teacher, schedule_from_dict
from raydistill.models.text import NULL, WORD_VECTORS, load_null, null_text, save_null
from raydistill.sampler import SamplingPlan

VERSION = 1
CARD = "student.json"
Kind = Literal["dual", "single", "dual_full", "motion"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything about a student but its weights."""

    kind: Kind
    boundary: float | None
    """Time at which the semantic expert hands over; None for a single expert."""
    grid: TimeGrid
    guidance_scale: float
    """Guidance of the teacher it was distilled from; also that of a teacher's tail."""
    guidance_scale_2: float | None = None
    """That of a second network of the teacher, where it has its own."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest guidance, where every sample had its own."""
    schedule: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The teacher's noise schedule in diffusers' words; empty: rectified flow."""
    latent_shape: tuple[int, int, int, int]
    """Channels, frames, height, width it was trained on."""
    text_shape: tuple[int, int]
    lora: tuple[int, float] | None = None
    """Rank and alpha of the detail expert's low-rank branch, or of a motion student's."""
    semantic_lora: tuple[int, float] | None = None
    """Rank and alpha of a semantic expert that is a LoRA on its teacher."""
    sources: Mapping[str, Any] = field(default_factory=dict)
    """Digests of teacher, codec and latents, the seed, and `text`: the identity of the text encoder."""

    @property
    def first_lora(self) -> tuple[int, float] | None:
        """Rank and alpha of a first expert that is a LoRA. Raises StaleArtifact if they are lost."""
        return _lora(self) if self.kind == "motion" else self.semantic_lora

    @property
    def text(self) -> Mapping[str, Any]:
        """What embeds its captions: {"kind": "word_vectors", ...}, or a pipeline's `prompts_identity`."""
        told = self.sources.get("text", WORD_VECTORS)
        return {"kind": told} if isinstance(told, str) else told  # a name alone in the first releases

    def require_word_vectors(self) -> None:
        """Raise StaleArtifact if captions are embedded by a real teacher's text encoder."""
        if (encoder := self.text["kind"]) != WORD_VECTORS:
            raise StaleArtifact(
                f"this student's captions are those of a {encoder}, not the small world's word vectors: name "
                "clips of its own that no training saw, data=FOLDER of jobs/prepare.py"
            )


@dataclass(frozen=True)
class Student:
    """A loaded student: its experts by name, ready for `raydistill.sampler`."""

    card: Card
    fields: Mapping[str, VelocityField]
    """'semantic', 'detail', and 'teacher' (guided) when one was given."""
    plans: Mapping[str, SamplingPlan]
    """As stored, by name: '4' is four steps of the student, '2+tail' two and the teacher for the rest."""
    schedule: Schedule = RECTIFIED_FLOW

    def plan(self, name: int | str) -> SamplingPlan:
        """Return a stored plan by number of steps or name, `plan(4)` or `plan("2+tail")`.

        Raises SamplingError for one that is not stored, or that needs a network which was not loaded.
        """
        plan = self.plans.get(str(name))
        if plan is None:
            raise SamplingError(f"this student has no plan '{name}'; it has {', '.join(self.plans)}")
        if missing := sorted({one.expert for one in plan.jumps} - set(self.fields)):
            raise SamplingError(
                f"plan '{name}' needs the {', '.join(missing)}: load_student(folder, teacher=its folder)"
            )
        return plan

    def require_codec(self, folder: str | Path) -> None:
        """Raise StaleArtifact unless the student's latents are of the codec in this folder."""
        made = self.card.sources.get("codec")
        if made != codec_digest(folder):
            raise StaleArtifact(
                f"this student makes latents of another codec than {folder}: frames would be wrong"
            )

    @property
    def kind(self) -> str:
        """'dual', 'single', 'dual_full' or 'motion'."""
        return self.card.kind


def save_student(
    folder: Path,
    card: Card,
    first: Teacher,
    detail: Teacher | None,
    plans: Mapping[str, SamplingPlan] | Mapping[int, SamplingPlan],
    null_text: Tensor | None = None,
) -> None:
    """Write a student and its plans, by name or number of steps; `first` is its only or semantic expert.

    `null_text`: the empty caption's embedding; that of word vectors is zero, and needs no file. The card
    comes last, so that a folder without one is never taken for whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    if (lora := card.first_lora) is not None:
        save_lora(first, folder, *lora)
    else:
        first.network.save_pretrained(folder / "semantic", safe_serialization=True)
    if detail is not None and card.kind == "dual_full":
        detail.network.save_pretrained(folder / "detail", safe_serialization=True)
    elif detail is not None:
        save_file({k: v.contiguous() for k, v in own_state(detail).items()}, folder / "detail.safetensors")
    if null_text is not None and bool(null_text.any()):
        save_null(folder, null_text)
    values = {
        "version": VERSION,
        **asdict(card),
        "plans": {str(n): p.to_dict() for n, p in plans.items()},
        "sha256": tree_files(folder),
    }
    write_json(folder / CARD, {**values, "checksum": fingerprint(values)})


def read_card(folder: Path) -> tuple[Card, dict[str, SamplingPlan]]:
    """Read and check a student's card; returns it with the stored plans.

    Raises MissingArtifact, StaleArtifact (another release's card) or CorruptArtifact (the card differs from
    its own checksum, or a file from its hash).
    """
    values = _read_values(folder / CARD)
    promised, found = values.pop("sha256", {}), tree_files(folder)
    wrong = sorted(name for name, digest in promised.items() if found.get(name) != digest)
    if wrong:
        raise CorruptArtifact(
            f"{folder}: {', '.join(wrong)} differ from what {CARD} says: copy the student again"
        )
    try:
        plans = {name: SamplingPlan.from_dict(plan) for name, plan in values.pop("plans").items()}
        for name in ("latent_shape", "text_shape"):
            values[name] = tuple(values[name])
        for name in ("lora", "semantic_lora", "guidance_range"):
            values[name] = tuple(values[name]) if values.get(name) else None
        values["grid"] = TimeGrid(**values["grid"])
        return Card(**values), plans
    except (TypeError, KeyError, AttributeError, UnknownKey) as other:
        raise StaleArtifact(f"{folder / CARD} is of another release ({other}): distil again") from other


def _read_values(path: Path) -> dict[str, Any]:
    """Read a card's JSON and compare it with its own checksum."""
    if not path.is_file():
        raise MissingArtifact(
            f"no student at {path.parent}: {CARD} is missing; jobs/distill.py writes it last"
        )
    try:
        values = json.loads(path.read_bytes())
        version, checksum = values.pop("version", None), values.pop("checksum", None)
    except (ValueError, AttributeError, TypeError) as broken:
        raise CorruptArtifact(f"{path} is not a whole card: {broken}: copy the student again") from broken
    if version != VERSION:
        raise StaleArtifact(f"{path} is not of version {VERSION}: distil again with this release")
    if checksum != fingerprint({"version": version, **values}):
        raise CorruptArtifact(f"{path} differs from its own checksum: copy the student again")
    return values


def load_student(
    path: str | Path,
    teacher: str | Path | None = None,
    *,
    merged: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Student:
    """Load a student onto `device`; with the teacher's folder also plans with a teacher's tail can run.

    A motion student is nothing without its teacher's folder (MissingArtifact).
    merged: LoRA is folded into weights of the student's own, the fastest form. False keeps base and branch
    apart: bit-equal to what was trained, smaller in memory. dtype: of the weights; bfloat16 halves them, and
    the state of sampling stays as it is.
    Raises what `read_card` raises. The teacher must be the one it was distilled from (StaleArtifact).
    """
    folder = Path(path)
    card, plans = read_card(folder)
    network = None
    if teacher is not None:
        found = teacher_digest(teacher)
        if card.sources.get("teacher") not in (None, found):
            raise StaleArtifact(f"{folder} was distilled from another teacher than {teacher}")
        network = load_whole_teacher(teacher, card.guidance_scale).requires_grad_(False)
    experts = _experts(folder, card, network, merged=merged)
    # Not before: files and new layers come on the CPU.
    for module in (*experts.values(), *([network] if network is not None else [])):
        cast_parameters(module, dtype)
    fields: dict[str, VelocityField] = {name: expert.to(device) for name, expert in experts.items()}
    if network is not None:
        own = (folder / NULL).is_file()
        null = load_null(folder) if own else null_text(torch.empty(1, *card.text_shape))
        fields["teacher"] = guide_teacher(
            network.to(device), null.to(device), card.guidance_scale, card.guidance_scale_2
        )
    return Student(card, fields, plans, schedule_from_dict(card.schedule))


def is_lora(path: str | Path) -> bool:
    """Whether a student can only be loaded with its teacher. Raises what `read_card` raises."""
    return read_card(Path(path))[0].first_lora is not None


def _experts(
    folder: Path, card: Card, teacher: Teacher | PairField | None, *, merged: bool
) -> dict[str, Teacher]:
    """Load a student's networks by name; one that is a LoRA stands on its teacher."""
    experts = {"semantic": _first(folder, card, teacher)}
    if card.kind == "dual_full":
        second = load_teacher(folder / "detail", guidance_scale=card.guidance_scale)
        experts["detail"] = second.requires_grad_(False)
    elif card.kind == "dual":
        detail = add_detail(experts["semantic"], *_lora(card), seed=0)
        load_own_state(detail, load_file(folder / "detail.safetensors"))
        experts["detail"] = detail.requires_grad_(False).eval()
    return {name: merge(expert) for name, expert in experts.items()} if merged else experts


def _first(folder: Path, card: Card, teacher: Teacher | PairField | None) -> Teacher:
    """Load the semantic or only expert."""
    if (lora := card.first_lora) is None:
        return load_teacher(folder / "semantic", guidance_scale=card.guidance_scale).requires_grad_(False)
    if teacher is None:
        raise MissingArtifact(f"{folder} is a LoRA on its teacher: load_student(folder, teacher=its folder)")
    return load_lora(teacher.high if isinstance(teacher, PairField) else teacher, folder, *lora)


def _lora(card: Card) -> tuple[int, float]:
    """Rank and alpha. Raises StaleArtifact for a card without."""
    if card.lora is None:
        raise StaleArtifact(f"a student of kind '{card.kind}' without rank and alpha: distil again")
    return int(card.lora[0]), float(card.lora[1])
