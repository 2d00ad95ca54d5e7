"""Students of small random pipelines, off their start, and their folders for diffusers."""

from pathlib import Path

import pipeline_cases
import torch

from raydistill.consistency.schedule import TimeGrid, shift
from raydistill.models.expert import add_detail
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.models.lora import add_lora
from raydistill.models.prompts import PromptEncoder, prompts_identity
from raydistill.models.teacher import load_teacher, read_schedule
from raydistill.sampler import build_plan, plan_lcm, plan_times, with_tail
from raydistill.student import Card, save_student

FLOW = TimeGrid(50, shift=17.0, last=shift(0.001, 17.0))
GRIDS = {
    "cogvideox": TimeGrid(50),
    "modelscope": TimeGrid(50, last=0.001),
    "animatediff": TimeGrid(50, last=0.001),
}
RANK, ALPHA = 2, 6.0
CASES = (
    ("wan21", "dual"),
    ("wan21", "dual on a LoRA"),
    ("wan21", "single"),
    ("wan21", "motion"),
    ("wan22", "dual_full"),
    ("hunyuan", "dual"),
    ("hunyuan", "motion"),
    ("cogvideox", "dual"),
    ("cogvideox", "motion"),
    ("modelscope", "motion"),
    ("modelscope", "single"),
    ("modelscope", "dual"),
    ("animatediff", "motion"),
    ("animatediff", "dual"),
    ("animatediff", "dual_full"),
)
PLANS = {("animatediff", "motion"): "3"}
"""Plans that are exported where it is not '4'; this one's times are none of LCM's."""


def off_start(field, seed):
    """Move what is trained: LoRA's B is not zero, copies differ from what they were made of."""
    rng = torch.Generator().manual_seed(seed)
    for p in field.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return field.requires_grad_(False)


def text_length(kind):
    """Tokens of the small CogVideoX; 0, the pipeline's own, of the others."""
    return 10 if kind == "cogvideox" else 0


def save_real_student(folder, kind, method, pipeline=None, **changes) -> tuple[Path, Path]:
    """Write folder/pipeline and folder/student with plans 2, 4 and, of two experts, 2+tail; returns both.

    Of MCM's also 3, unevenly.
    """
    pipeline = pipeline or pipeline_cases.save(Path(folder) / "pipeline", kind)
    grid, two = GRIDS.get(kind, FLOW), method.startswith("dual")
    boundary = grid.nodes[13 if kind != "wan22" else 36] if two else None  # Wan2.2's networks meet at 0.875
    teacher = load_teacher(pipeline, guidance_scale=pipeline_cases.GUIDANCE)
    detail = None
    on_lora = method in ("motion", "dual on a LoRA")
    if on_lora:
        first = off_start(add_lora(teacher, RANK, ALPHA, seed=1), 2)
    else:
        first = off_start(teacher.requires_grad_(True), 3)
    if method in ("dual", "dual on a LoRA"):
        detail = off_start(add_detail(first, RANK, ALPHA, seed=4), 5)
    if method == "dual_full":
        second = load_teacher(pipeline, "detail", guidance_scale=pipeline_cases.GUIDANCE)
        detail = off_start(second.requires_grad_(True), 6)
    text = PromptEncoder(pipeline, text_length(kind))
    sources = {"codec": codec_digest(pipeline), "teacher": teacher_digest(pipeline), "seed": 7}
    sources |= {"data": "0" * 64, "text": prompts_identity(pipeline, text_length(kind))}
    values = {
        "kind": method.split()[0],
        "boundary": boundary,
        "grid": grid,
        "guidance_scale": pipeline_cases.GUIDANCE,
        "schedule": read_schedule(pipeline),
        "latent_shape": tuple(pipeline_cases.latents_of(kind).shape[1:]),
        "text_shape": tuple(text([""]).shape[1:]),
        "lora": (RANK, ALPHA) if method in ("dual", "motion", "dual on a LoRA") else None,
        "semantic_lora": (RANK, ALPHA) if method == "dual on a LoRA" else None,
        "sources": sources,
    }
    card = Card(**{**values, **changes})
    if method == "motion":
        plans = {str(n): plan_lcm(n, grid) for n in (2, 4)}
        plans["3"] = plan_times((1.0, 0.9, 0.3, 0.0), None, grid.last, "renoise")
    else:
        plans = {str(n): build_plan(n, boundary, grid) for n in (2, 4)}
    if two:
        plans["2+tail"] = with_tail(2, boundary, grid)
    student = Path(folder) / "student"
    save_student(student, card, first, detail, plans, text([""])[0])
    return student, pipeline
