"""Student, codec and, where a plan needs it, teacher -> one folder that a server loads; see `bundle.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from raydistill.artifacts import file_sha256, tree_digest
from raydistill.config.export import require_name, require_size
from raydistill.errors import (
    ArtifactError,
    InvalidValue,
    MissingValue,
    SamplingError,
    StaleArtifact,
)
from raydistill.models.codec import ClipCodec, FrameCodec, load_codec
from raydistill.models.folders import (
    NETWORKS,
    built_beside,
    codec_digest,
    copy_durably,
    files_of,
    located,
    names_in,
    part_folder,
    teacher_digest,
)
from raydistill.models.folders import TEXT as TEXT_PARTS
from raydistill.models.prompts import PromptEncoder, prompts_identity
from raydistill.models.protocols import TextEncoder
from raydistill.models.teacher import read_teacher_config, require_fit
from raydistill.models.text import WORD_VECTORS, WordVectors
from raydistill.sampler import SamplingPlan, keyed_noise, sample, teacher_plan
from raydistill.sampler import default_plan as own_default
from raydistill.service.bundle import (
    CODEC,
    STUDENT,
    TEACHER,
    TEXT,
    BundleCard,
    PlanCard,
    ShapeCard,
    in_order,
    read_bundle,
    verify_bundle,
    write_bundle_card,
)
from raydistill.service.scores import read_scores
from raydistill.student import Card, Student, load_student, read_card

DOWN = 8
"""Pixels per latent pixel, of every codec."""
SEED = 20240
CAPTIONS = (
    "a red square moves slowly left over a striped background",
    "a blue circle moves quickly up over a plain background",
    "a green triangle moves slowly right over a shaded background",
    "a yellow square moves quickly down over a plain background",
    "a dog runs along a beach at sunset",
    "snow falls on a dark forest",
)
"""Of the clips that previews are fitted to."""
Codec = FrameCodec | ClipCodec


@dataclass(frozen=True)
class Exported:
    """What is in the folder now."""

    folder: Path
    card: BundleCard
    left_out: tuple[str, ...]
    """What is not in it, and why."""
    written: bool
    """False: it was there already."""


def export_bundle(
    student: str | Path,
    codec: str | Path,
    output: str | Path,
    *,
    name: str,
    fps: int,
    teacher: str | Path | None = None,
    teacher_steps: Sequence[int] = (),
    sizes: Sequence[tuple[int, int, int]] = (),
    scores: str | Path | None = None,
    default_plan: str | None = None,
    text: str | Path | None = None,
    device: str = "cpu",
    preview: bool = True,
) -> Exported:
    """Check everything, copy it beside `output`, rename; the same bundle there already is left as it is.

    teacher_steps: of plans that are the teacher's alone. sizes: further (frames, height, width) in pixels.
    scores: output folder of jobs/evaluate.py. Plans that need a teacher are left out without one.
    text: pipeline whose text encoder a real teacher's captions are from; None: the teacher's. preview: fit
    the map of `fit_preview`, on `device`. All is checked before any network but the codec is loaded.
    Raises MissingValue for a student that is nothing without its teacher, InvalidValue for a setting that
    does not fit and for an `output` that holds something else, and an ArtifactError for what cannot be read,
    was changed, or belongs to another student.
    """
    require_name(name)
    stored, all_plans = read_card(Path(student))
    all_plans |= {f"{TEACHER}{steps}": teacher_plan(steps, stored.grid) for steps in teacher_steps}
    plans = _kept(stored, all_plans, teacher)
    default = _default(default_plan, plans)
    _require_own(stored, codec, teacher)
    spoken, encoder_files = _text(stored, text or teacher)
    decoder = load_codec(codec)
    parts = {STUDENT: _files(Path(student)), CODEC: _files(part_folder(codec, "vae")), **encoder_files}
    if teacher and (stored.first_lora or any(_needs_teacher(plan) for plan in plans.values())):
        parts[TEACHER] = _files(located(teacher, NETWORKS), (*NETWORKS, "scheduler"))
    files = {f"{part}/{n}": file_sha256(at) for part, held in parts.items() for n, at in held.items()}
    sources = {**stored.sources, "student": tree_digest(student)}
    cards = in_order({key: plan_card(plan, stored) for key, plan in plans.items()})
    card = BundleCard(
        name=name,
        kind=stored.kind,
        plans=cards,
        default_plan=default,
        shapes=_shapes(
            stored, decoder, sizes, (teacher if stored.first_lora else None) or Path(student) / "semantic"
        ),
        fps=fps,
        shift=stored.grid.shift,
        boundary=stored.boundary,
        guidance_scale=stored.guidance_scale,
        text=spoken,
        codec_kind=type(decoder.autoencoder).__name__,
        sources=sources,
        scores=read_scores(scores, sources, cards, stored.guidance_scale) if scores else {},
        files=files,
    )
    left_out = _left_out(all_plans, plans, teacher, parts)
    if (there := _same_there(Path(output), card)) is not None:
        return Exported(Path(output), there, left_out, written=False)
    loaded = load_student(student, teacher if TEACHER in parts else None, device=device)
    if preview:
        encoder = _encoder(stored, text or teacher)
        card = replace(card, preview=fit_preview(loaded, decoder.to(device), card, encoder, device))
    _write(parts, card, Path(output))
    return Exported(Path(output), card, left_out, written=True)


def _files(folder: Path, parts: Sequence[str] = ()) -> dict[str, Path]:
    """Files of a part by name: of a pipeline's folder those of these parts alone."""
    names = names_in(folder, parts) if parts else files_of(folder)
    return {name: folder / name for name in names}


def _require_own(card: Card, codec: str | Path, teacher: str | Path | None) -> None:
    """Codec and teacher must be the student's. Raises StaleArtifact."""
    if card.sources.get("codec") != codec_digest(codec):
        raise StaleArtifact(
            f"this student makes latents of another codec than {codec}: frames would be wrong"
        )
    if teacher and card.sources.get("teacher") not in (None, teacher_digest(teacher)):
        raise StaleArtifact(f"this student was distilled from another teacher than {teacher}")


def _text(card: Card, pipeline: str | Path | None) -> tuple[Mapping[str, Any], dict[str, dict[str, Path]]]:
    """Identity of what embeds a student's captions, and its files.

    Raises MissingValue without the pipeline that it needs, StaleArtifact for another than the student's.
    """
    asked = card.text
    if asked["kind"] == WORD_VECTORS:
        return WordVectors(*card.text_shape).identity, {}
    if pipeline is None:
        raise MissingValue(
            "text", f"captions are embedded by a {asked['kind']}: name its folder, or teacher="
        )
    found = prompts_identity(pipeline, asked.get("length", 0), asked.get("precision", "fp32"))
    if found["digest"] != asked.get("digest"):
        raise StaleArtifact(f"this student's captions are by another text encoder than that of {pipeline}")
    return found, {TEXT: _files(located(pipeline, TEXT_PARTS), TEXT_PARTS)}


def _encoder(card: Card, pipeline: str | Path | None) -> TextEncoder:
    """Load what embeds a student's captions."""
    if card.text["kind"] == WORD_VECTORS or pipeline is None:
        return WordVectors(*card.text_shape)
    return PromptEncoder(pipeline, card.text["length"], card.text["precision"])


def fit_preview(
    student: Student, codec: Codec, card: BundleCard, encoder: TextEncoder, device: str = "cpu"
) -> dict[str, Any]:
    """Fit RGB in [-1, 1] as a linear map of a latent pixel, to clips of the default plan: see `BundleCard`.

    Frames are averaged over each latent pixel, and over the frames that share a latent frame. `device`: of
    student and codec. Raises StaleArtifact if the codec's frames have another size than the card says,
    SamplingError if the student's latents are not finite.
    """
    plan, shape = student.plan(card.default_plan), card.shapes[0]
    text = encoder(CAPTIONS)
    inputs, targets = list[Tensor](), list[Tensor]()
    for i in range(len(CAPTIONS)):  # one by one: frames of a large student are large
        noise_at = keyed_noise(SEED, torch.tensor([i]))
        noise, said = noise_at(0, (1, *shape.latent)).to(device), text[i : i + 1].to(device)
        latents = sample(student.fields, student.schedule, plan, noise, said, noise_at=noise_at)
        if not latents.isfinite().all():
            raise SamplingError(f"plan '{card.default_plan}' makes latents that are not finite: distil again")
        with torch.inference_mode():
            frames = codec.decode(latents)
        if tuple(frames.shape[2:]) != (shape.frames, shape.height, shape.width):
            raise StaleArtifact(f"the codec makes frames of {tuple(frames.shape[2:])}, not of {shape}")
        inputs.append(latents[0].flatten(1).T.double().cpu())
        targets.append(frames_at_latents(frames, shape.latent)[0].flatten(1).T.double().cpu())
    x, y = torch.cat(inputs), torch.cat(targets)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1), y, driver="gelsd").solution
    wrong = (x @ solved[:-1] + solved[-1] - y).square().sum()
    spread = (y - y.mean(dim=0)).square().sum()
    return {
        "matrix": [[round(v, 6) for v in row] for row in solved[:-1].tolist()],
        "bias": [round(v, 6) for v in solved[-1].tolist()],
        "r2": round(float(1 - wrong / spread), 4) if spread > 0 else 0.0,
    }


def frames_at_latents(frames: Tensor, latent: Sequence[int]) -> Tensor:
    """Average frames (b, 3, F, H, W) to the latents' (b, 3, f, h, w); the first latent frame is one frame."""
    f, h, w = latent[1:]
    first = adaptive_avg_pool3d(frames[:, :, :1], (1, h, w))
    if f == 1:
        return first
    return torch.cat([first, adaptive_avg_pool3d(frames[:, :, 1:], (f - 1, h, w))], dim=2)


def _needs_teacher(plan: SamplingPlan) -> bool:
    return any(one.expert == TEACHER for one in plan.jumps)


def _kept(
    card: Card, plans: Mapping[str, SamplingPlan], teacher: str | Path | None
) -> dict[str, SamplingPlan]:
    """Plans that can run. Raises MissingValue if there are none without a teacher."""
    if teacher:
        return dict(plans)
    if card.first_lora:
        raise MissingValue("teacher", "this student is a LoRA on its teacher: name the teacher's folder")
    kept = {name: plan for name, plan in plans.items() if not _needs_teacher(plan)}
    if not kept:
        raise MissingValue("teacher", "every plan of this student needs it: name the teacher's folder")
    return kept


def _left_out(
    plans: Mapping[str, SamplingPlan],
    kept: Mapping[str, SamplingPlan],
    teacher: str | Path | None,
    parts: Mapping[str, Any],
) -> tuple[str, ...]:
    why = "it needs the teacher, and none was given: teacher=FOLDER"
    unused = [f"teacher {teacher}: no plan needs it"] if teacher and TEACHER not in parts else []
    return (*(f"plan {name}: {why}" for name in plans if name not in kept), *unused)


def plan_card(plan: SamplingPlan, card: Card) -> PlanCard:
    """Say what a plan costs."""
    return PlanCard(
        **plan.to_dict(),
        num_steps=len(plan.jumps),
        passes=plan.passes(tail_guided=card.guidance_scale != 1),
        experts=tuple(dict.fromkeys(one.expert for one in plan.jumps)),
    )


def _default(asked: str | None, plans: Mapping[str, SamplingPlan]) -> str:
    """Plan for requests that name none. Raises InvalidValue for one that is not there."""
    if asked and asked not in plans:
        known = f"one of {', '.join(plans)}; those with the teacher's tail need teacher=FOLDER"
        raise InvalidValue("default_plan", asked, known)
    return asked or own_default(plans)


def _shapes(
    card: Card, codec: Codec, sizes: Sequence[tuple[int, int, int]], network: str | Path
) -> tuple[ShapeCard, ...]:
    """Size of the training, then the sizes asked for. Raises InvalidValue for one that does not fit."""
    channels, f, h, w = card.latent_shape
    first = ShapeCard(frames=codec.num_frames(f), height=DOWN * h, width=DOWN * w, latent=(channels, f, h, w))
    more = [_shape(size, card, codec, network) for size in sizes]
    return tuple(dict.fromkeys([first, *more]))


def _shape(size: tuple[int, int, int], card: Card, codec: Codec, network: str | Path) -> ShapeCard:
    """Compare a size with codec and network. Raises InvalidValue."""
    require_size(size)
    frames, height, width = size
    f = next((n for n in range(1, frames + 1) if codec.num_frames(n) == frames), None)
    if f is None:
        less = max(m for m in map(codec.num_frames, range(1, frames + 1)) if m < frames)
        raise InvalidValue("sizes", list(size), f"the codec makes {less} frames, not {frames}")
    if height % DOWN or width % DOWN:
        raise InvalidValue("sizes", list(size), f"height and width in multiples of {DOWN}")
    latent = (card.latent_shape[0], f, height // DOWN, width // DOWN)
    try:
        require_fit(network, latent, card.text_shape)
    except StaleArtifact as unfit:
        fit = str(unfit).rpartition(":")[0]  # what follows is advice for another job
        raise InvalidValue("sizes", list(size), fit) from unfit
    net = read_teacher_config(network)
    places, patch = net.get("rope_max_seq_len"), net.get("patch_size", (1, 1, 1))
    if places and any(n // step > places for n, step in zip(latent[1:], patch, strict=True)):
        raise InvalidValue("sizes", list(size), f"the network has {places} positions along each axis")
    return ShapeCard(frames=frames, height=height, width=width, latent=latent)


def _same_there(output: Path, card: BundleCard) -> BundleCard | None:
    """Return the bundle in the folder if it is of the same making; None where there is nothing.

    Raises InvalidValue if there is anything else, CorruptArtifact if it is damaged.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    do = "delete it, or take another output"
    try:
        there = read_bundle(output)
    except ArtifactError as other:
        raise InvalidValue("output", str(output), f"something else is there ({other}): {do}") from other
    # A preview follows from the rest, but for what another machine rounds otherwise.
    if replace(there, preview=None).digest != card.digest:
        raise InvalidValue("output", str(output), f"another bundle is there, {there.label}: {do}")
    return verify_bundle(output)


def _write(parts: Mapping[str, Mapping[str, Path]], card: BundleCard, output: Path) -> None:
    """Copy into a folder beside, the card last, and rename: `output` is a whole bundle or is not there."""
    with built_beside(output) as beside:
        for part, held in parts.items():
            for name, source in held.items():
                copy_durably(source, beside / part / name)
        write_bundle_card(beside, card)
        verify_bundle(beside)  # files that changed meanwhile, and a disk that lies
