"""The README.md of an exported folder, in the form of the Hugging Face hub's model cards."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from omegaconf import OmegaConf

from raydistill.config.stages import OBJECTIVE_TERMS
from raydistill.models.folders import HUB_NAME
from raydistill.pipelines.schedulers import Steps
from raydistill.pipelines.usage import usage_of
from raydistill.student import Card

METHODS = {
    "dual": "DCM (arXiv 2506.03123): a semantic expert for the noisy part of the path, a detail expert below",
    "dual_full": "DCM (arXiv 2506.03123) with two whole networks, one for each part of the path",
    "single": "one consistency model for the whole path (LCM, arXiv 2310.04378)",
    "motion": "MCM (arXiv 2406.06890): motion of videos, appearance of images, one LoRA for the whole path",
}
OLDEST = "0.42"
"""Release of diffusers: older ones do not know `dtype`, nor a LoRA's alpha beside its weights."""


@dataclass(frozen=True)
class About:
    """What a card tells of."""

    card: Card
    student: Path
    """Its folder; the run's settings and figures are looked for in the one above."""
    teacher: str
    """As it was named."""
    kind: str
    """Class of the pipeline."""
    steps: Steps
    name: str
    fps: int
    license: str
    """As the hub abbreviates it; empty: not stated."""


def card_text(about: About, *, lora: bool, comfyui: bool, scores: Mapping[str, Any]) -> str:
    """Write the card: how to sample, times, what it was made of, losses, scores, licence."""
    data = ModelCardData(
        license=about.license or None,
        base_model=about.teacher if _on_hub(about.teacher) else None,
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=["raydistill", "few-step", "lora" if lora else about.card.kind.replace("_", "-")],
    )
    count = len(about.steps.plan.jumps)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {about.name}",
        f"Text to video in {count} step{'s' * (count > 1)}, {about.steps.plan.passes()} network passes. Made "
        f"with raydistill: {METHODS[about.card.kind]}.",
        f"## Sampling\n\n```python\n{usage_of(about.kind, about.card, about.steps, about.fps, lora=lora)}```",
        "\n".join(_notes(about)),
        *([_comfyui(about)] if comfyui else []),
        f"## Times\n\n{_table(_times(about))}",
        f"## Made of\n\n{_table(_sources(about))}",
        f"## Losses\n\n{_losses(about.student.parent)}",
        f"## Scores\n\n{_scores(scores)}",
        f"## Licence\n\n{_licence(about.license)}",
    ]
    return "\n\n".join(parts) + "\n"


def _on_hub(teacher: str) -> bool:
    return bool(HUB_NAME.fullmatch(teacher)) and not Path(teacher).exists()


def _table(rows: Iterable[Sequence[Any]]) -> str:
    """Lay out rows, the first of which is the head."""
    head, *body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *body])


def _notes(about: About) -> Iterable[str]:
    yield f"- Needs diffusers {OLDEST} or later{', and peft' if about.card.first_lora else ''}."
    yield f"- Steps, guidance and size are those of the training: guidance {_guidance(about.card)} is in the"
    yield "  weights, and no negative prompt is needed."
    if about.card.boundary is not None:
        yield f"- The experts meet at t = {about.card.boundary:.6g}, and a step must end there."
    yield "- Without these times a call takes those of the scheduler's config: the last column below."


def _comfyui(about: About) -> str:
    how = "lcm" if about.steps.plan.path == "renoise" else "euler"
    times = ", ".join(f"{t:.6g}" for t in (*about.steps.times, 0.0))
    guidance = ""
    if about.kind == "HunyuanVideoPipeline":
        guidance = f", FluxGuidance {about.card.guidance_scale:g}"
    return (
        f"## ComfyUI\n\n`comfyui/{about.name}.safetensors` is the same LoRA, for LoraLoaderModelOnly at "
        f"strength 1. Sampler `{how}`, cfg 1{guidance}, ManualSigmas `{times}` in place of a shift."
    )


def _times(about: About) -> Iterable[Sequence[Any]]:
    yield ("step", "t", "network", "t by the config alone")
    for k, (one, bare) in enumerate(zip(about.steps.plan.jumps, about.steps.bare, strict=True), start=1):
        yield (k, f"{one.t:.6f}", one.expert, f"{bare:.6f}")


def _sources(about: About) -> Iterable[Sequence[Any]]:
    yield ("what", "fingerprint")
    name = about.teacher if _on_hub(about.teacher) else Path(about.teacher).name  # where it lies is nobody's
    yield (f"teacher {name}, {about.kind}", f"`{about.card.sources.get('teacher', 'not known')}`")
    for name, value in about.card.sources.items():
        if name not in ("teacher", "text"):
            yield (name, f"`{value}`")
    yield ("captions", f"`{about.card.text.get('digest', about.card.text['kind'])}`")
    yield ("guidance", _guidance(about.card))


def _guidance(card: Card) -> str:
    if card.guidance_range is not None:
        return "{:g} to {:g}".format(*card.guidance_range)
    second = f", {card.guidance_scale_2:g} of the second network" if card.guidance_scale_2 else ""
    return f"{card.guidance_scale:g}{second}"


def _losses(run: Path) -> str:
    """Weights of the terms and their last figures, from the run's own files."""
    settings, metrics = run / "config.yaml", run / "metrics.jsonl"
    if not settings.is_file() or not metrics.is_file():
        return "The run's settings and figures were not beside the student when it was exported."
    config, last = OmegaConf.load(settings), dict[str, Mapping[str, Any]]()
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a killed run's last line
            one = json.loads(line)
            last[one["stage"]] = one
    rows: list[Sequence[Any]] = [("stage", "steps", "term", "weight", "last value")]
    for stage, figures in last.items():
        objective = OmegaConf.select(config, f"{stage}.objective") or {}
        for term in OBJECTIVE_TERMS:
            if weight := objective.get(term, 0):
                value = figures.get(f"loss/{term}")
                rows.append((stage, figures["step"], term, f"{weight:g}", _figure(value)))
    return _table(rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _scores(scores: Mapping[str, Any]) -> str:
    if not scores:
        return "Not measured."
    rows: list[Sequence[Any]] = [("measure", "value", "95 % interval")]
    for name, one in scores["figures"].items():
        rows.append((name, _figure(one["value"]), f"{_figure(one['low'])} to {_figure(one['high'])}"))
    return f"On {scores['num_clips']} clips, {scores['num_seeds']} training(s).\n\n{_table(rows)}"


def _licence(license: str) -> str:
    if license:
        return (
            f"`{license}`, as whoever exported it states. The teacher's licence and the data's hold as well."
        )
    return "Not stated by whoever exported it. The teacher's licence and that of the data hold."
