"""A student of a real teacher as a pipeline's folder, which diffusers loads without this package.

model_index.json, scheduler/, vae/, text_encoder/ ...   as in the teacher's own folder
transformer/ or unet/         the student; of two experts the semantic one
transformer_2/ or unet_2/     the detail expert, all of it; Wan's pipeline knows what it is, the model card's
                              lines hand it to the others
pytorch_lora_weights.safetensors    of a student that is a LoRA, whose base is then in transformer/
comfyui/                      the same LoRA by the names of the model's own release
README.md                     model card, with the lines that sample
export.json                   what it was made of, and the sha256 of every other file; written last
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version

from raydistill.artifacts import tree_digest, tree_files, write_json
from raydistill.config.export import require_name
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, StaleArtifact
from raydistill.models.folders import (
    INDEX,
    NETWORKS,
    built_beside,
    codec_digest,
    copy_durably,
    files_of,
    located,
    network_folders,
    read_index,
    require_whole,
    teacher_digest,
)
from raydistill.models.lora import FILE as LORA
from raydistill.models.lora import merge
from raydistill.models.prompts import CLIPS, LENGTHS, prompts_identity
from raydistill.pipelines.comfyui import has_comfyui, write_comfyui
from raydistill.pipelines.model_card import About, card_text
from raydistill.pipelines.schedulers import Steps, boundary_ratio_of, steps_of
from raydistill.sampler import default_plan
from raydistill.student import Card, load_student, read_card

RECORD, VERSION = "export.json", 1
KNOWN = (*LENGTHS, *CLIPS)
"""Pipelines that a student can be put into."""
WITHOUT_LORA = "TextToVideoSDPipeline"
"""Its pipeline loads no LoRA; the branches are folded into its weights."""


@dataclass(frozen=True)
class Exported:
    """What is in the folder now."""

    folder: Path
    kind: str
    """Class of the pipeline."""
    steps: Steps
    comfyui: Path | None
    written: bool
    """False: it was there already."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of an export."""

    name: str
    fps: int = 8
    plan: str = ""
    """Name of a stored plan; empty: '4', or else the one of most steps."""
    path: str = ""
    """'deterministic' or 'renoise' in place of the plan's own."""
    license: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Figures of an evaluation by plan, as in a bundle's card."""


def export_pipeline(student: str | Path, teacher: str | Path, output: str | Path, wanted: Wanted) -> Exported:
    """Write the folder beside `output`, then rename; the same one there already is left as it is.

    teacher: folder or hub name of the teacher's whole pipeline. Everything is checked first. Raises
    MissingArtifact for a pipeline that is not whole, StaleArtifact for a teacher, codec or text encoder that
    is not the student's, InvalidValue for a plan that diffusers' schedulers cannot take and for an `output`
    that holds something else.
    """
    require_name(wanted.name)
    student, output = Path(student), Path(output)
    card, plans = read_card(student)
    index = read_index(located(teacher, weights=False))
    kind = index.get("_class_name", "no pipeline")
    if kind not in KNOWN:
        raise MissingArtifact(
            f"pipeline: teacher={teacher} is {kind}: expected the whole folder of a {', '.join(KNOWN)}, with "
            "its codec and text encoders"
        )
    base = located(teacher, [part for part, value in index.items() if isinstance(value, list)])
    require_whole(base)
    _require_same_parts(card, base)
    plan = wanted.plan or default_plan(plans)
    if plan not in plans:
        raise InvalidValue("pipeline_plan", plan, f"one of {', '.join(plans)}")
    steps = steps_of(kind, card, plans[plan], plan, wanted.path)
    made = {
        "version": VERSION,
        "student": tree_digest(student),
        "teacher": str(teacher),
        "pipeline": kind,
        "wanted": asdict(wanted),
        "plan": steps.plan.to_dict(),
        "scheduler": type(steps.scheduler).__name__,
        "arguments": dict(steps.arguments),
    }
    lora = _keeps_lora(card, kind)
    comfyui = output / "comfyui" / f"{wanted.name}.safetensors" if lora and has_comfyui(kind) else None
    done = Exported(output, kind, steps, comfyui, written=not _same_there(output, made))
    if not done.written:
        return done
    about = About(card, student, str(teacher), kind, steps, wanted.name, wanted.fps, wanted.license)
    text = card_text(about, lora=lora, comfyui=comfyui is not None, scores=wanted.scores.get(plan, {}))
    with built_beside(output) as beside:
        _copy_parts(base, beside, keep_network=lora)
        if lora:
            copy_durably(student / LORA, beside / LORA)
        else:
            _write_networks(student, teacher, card, beside)
        if comfyui:
            write_comfyui(kind, student / LORA, beside / "comfyui" / comfyui.name, card)
        steps.scheduler.save_pretrained(beside / "scheduler")
        _write_index(base, beside, card, steps)
        (beside / "README.md").write_text(text, encoding="utf-8")
        write_json(beside / RECORD, {**made, "sha256": tree_files(beside)})
    return done


def _require_same_parts(card: Card, base: Path) -> None:
    """Teacher, codec and text encoder must be those of the student. Raises StaleArtifact."""
    if card.sources.get("teacher") not in (None, teacher_digest(base)):
        raise StaleArtifact(f"this student was distilled from another teacher than that of {base}")
    if card.sources.get("codec") not in (None, codec_digest(base)):
        raise StaleArtifact(f"this student makes latents of another codec than that of {base}")
    text = card.text
    found = prompts_identity(base, text.get("length", 0), text.get("precision", "fp32"))
    if text.get("digest") != found["digest"]:
        raise StaleArtifact(f"this student knows captions by another text encoder than that of {base}")


def _keeps_lora(card: Card, kind: str) -> bool:
    """Whether the folder has the base and a LoRA over it."""
    return card.first_lora is not None and card.boundary is None and kind != WITHOUT_LORA


def _same_there(output: Path, made: Mapping[str, Any]) -> bool:
    """Whether the folder is of the same making.

    Raises InvalidValue if there is anything else, CorruptArtifact if files differ from what was written.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    do = "delete it, or take another folder"
    try:
        there = json.loads((output / RECORD).read_bytes())
        promised = there.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as other:
        raise InvalidValue("pipeline", str(output), f"something else is there ({other!r}): {do}") from other
    if there != json.loads(json.dumps(made)):
        raise InvalidValue("pipeline", str(output), f"another export is there: {do}")
    found = {name: digest for name, digest in tree_files(output).items() if name != RECORD}
    if wrong := sorted({*promised, *found} - {n for n in found if promised.get(n) == found[n]}):
        raise CorruptArtifact(f"{output}: {', '.join(wrong)} are not as they were exported: {do}")
    return True


def _copy_parts(base: Path, beside: Path, *, keep_network: bool) -> None:
    """Copy the parts that the index names; of networks the first, where the student stands on it."""
    kept = network_folders(base)[0].name
    for part, value in read_index(base).items():
        if part == "scheduler" or not isinstance(value, list) or not (base / part).is_dir():
            continue
        if part in NETWORKS and not (keep_network and part == kept):
            continue
        for name in files_of(base / part):
            copy_durably(base / part / name, beside / part / name)


def _write_networks(student: Path, teacher: str | Path, card: Card, beside: Path) -> None:
    """Write the student's networks whole, the first by its name in the teacher's pipeline, `_2` the second.

    What lies in the student's folder as diffusers has it is copied; only branches are loaded, to be folded.
    """
    first = network_folders(teacher)[0].name
    names = {"semantic": first, "detail": f"{first}_2"}
    loaded: Mapping[str, Any] = {}
    if card.first_lora is not None or card.kind == "dual":
        on = teacher if card.first_lora is not None else None
        loaded = load_student(student, on, merged=False).fields  # both experts over one base
    for expert, name in names.items():
        if (student / expert).is_dir():
            for file in files_of(student / expert):
                copy_durably(student / expert / file, beside / name / file)
        elif expert in loaded:
            # Detail branches fold into layers of their own; the base that both share is not touched.
            merge(loaded[expert]).network.save_pretrained(beside / name, safe_serialization=True)


def _write_index(base: Path, beside: Path, card: Card, steps: Steps) -> None:
    """Name the parts as the pipeline's class loads them."""
    index = {**read_index(base), "_diffusers_version": diffusers_version}
    index["scheduler"] = ["diffusers", type(steps.scheduler).__name__]
    if index["_class_name"] == "WanPipeline":
        two = card.boundary is not None
        second = ["diffusers", "WanTransformer3DModel"] if two else [None, None]
        times = (*steps.times, *steps.bare)
        ratio = boundary_ratio_of(card.boundary, card.grid, times) if card.boundary is not None else None
        index |= {"transformer_2": second, "boundary_ratio": ratio}
    write_json(beside / INDEX, index)
