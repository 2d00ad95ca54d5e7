"""Bundles of small real students, off their start: experts, plans and captions all make a difference."""

from dataclasses import fields
from pathlib import Path

import torch

from raydistill.artifacts import tree_digest
from raydistill.consistency.schedule import TimeGrid
from raydistill.models.expert import add_detail
from raydistill.models.lora import add_lora, lora_state
from raydistill.models.wan import build_tiny_teacher
from raydistill.sampler import build_plan, with_tail
from raydistill.service.export import export_bundle
from raydistill.student import Card, load_student, read_card, save_student

ROOT = Path(__file__).resolve().parents[2]
CODEC = ROOT / "raydistill" / "world" / "weights" / "codec"
RANK, ALPHA = 2, 4.0


def save_untrained_bundle(folder, name="tiny", kind="dual", **changes) -> Path:
    """Export a student of any kind as folder/NAME, with plans 1, 2, 4, 8, and 2+tail if it has two experts.

    changes: fields of the student's `Card` (boundary, grid, guidance_scale ...), `path` of its plans, `seed`
    of its weights, or what `export_bundle` takes: fps, sizes, scores, default_plan, teacher (None: left out).
    Student and teacher stay in folder/NAME-made.
    """
    card = {one.name: changes.pop(one.name) for one in fields(Card) if one.name in changes}
    made = Path(folder) / f"{name}-made"
    save_untrained_student(made, kind, changes.pop("seed", 1), changes.pop("path", "deterministic"), **card)
    given = {"teacher": made / "teacher", "fps": 8, **changes}
    return export_bundle(made / "student", CODEC, Path(folder) / name, name=name, **given).folder


def sources_of(bundle) -> tuple[Path, Path]:
    """Student and teacher of a bundle made here."""
    made = bundle.with_name(f"{bundle.name}-made")
    return made / "student", made / "teacher"


def save_broken_bundle(folder, bundle, name="broken") -> Path:
    """Export the dual student of `bundle` with infinite weights in its detail expert, which then gives NaN.

    Its default plan of one step leaves that expert out.
    """
    student, teacher = sources_of(bundle)
    card, plans = read_card(student)
    fields = load_student(student, teacher, merged=False).fields
    for weight in fields["detail"].parameters():
        weight.data.fill_(float("inf"))
    made = Path(folder) / f"{name}-made"
    semantic = load_student(student, teacher).fields["semantic"]
    without_tail = {plan: of for plan, of in plans.items() if plan != "2+tail"}
    save_student(made / "student", card, semantic, fields["detail"], without_tail)
    output = Path(folder) / name
    return export_bundle(made / "student", CODEC, output, name=name, fps=8, default_plan="1").folder


def conformance_bundles(folder, bundle) -> dict[str, str]:
    """The models that `conformance` asks for, of which `tiny` is the given bundle."""
    long = save_untrained_bundle(folder, name="long", grid=TimeGrid(4000))
    return {"tiny": str(bundle), "broken": str(save_broken_bundle(folder, bundle)), "long": str(long)}


def export_again(bundle, output, **changes):
    """Export the student of a bundle made here with other arguments; its name stays."""
    student, teacher = sources_of(bundle)
    given = {"name": bundle.name, "fps": 8, "teacher": teacher, **changes}
    return export_bundle(student, CODEC, output, **given)


def save_untrained_student(folder, kind="dual", seed=1, path="deterministic", **card):
    """Write folder/student and folder/teacher."""
    teacher = _shaken(seed + 1)
    teacher.network.save_pretrained(folder / "teacher")
    sources = {"codec": tree_digest(CODEC), "teacher": tree_digest(folder / "teacher"), "seed": seed}
    two = kind in ("dual", "dual_full")
    values = {
        "boundary": 0.6 if two else None,
        "grid": TimeGrid(10),
        "guidance_scale": 2.0,
        "latent_shape": (4, 16, 4, 4),
        "text_shape": (8, 32),
        "lora": (RANK, ALPHA) if kind in ("dual", "motion") else None,
        "sources": sources,
        **card,
    }
    boundary, grid = values["boundary"], values["grid"]
    first, detail = _experts(kind, teacher, seed)
    plans = {str(n): build_plan(n, boundary, grid, path) for n in (1, 2, 4, 8)}
    if two:
        plans["2+tail"] = with_tail(2, boundary, grid, path)
    save_student(folder / "student", Card(kind=kind, **values), first, detail, plans)
    return folder / "student"


def _experts(kind, teacher, seed):
    if kind == "motion":
        student = add_lora(teacher, RANK, ALPHA, seed)
        _shake(lora_state(student).values(), seed)
        return student, None
    semantic = _shaken(seed)
    if kind == "dual":
        detail = add_detail(semantic, RANK, ALPHA, seed)
        _shake([p for p in detail.parameters() if p.requires_grad], seed)
        return semantic, detail
    return semantic, _shaken(seed + 2) if kind == "dual_full" else None


def _shaken(seed):
    field = build_tiny_teacher(seed, dim_head=12, num_heads=2, num_layers=1)
    _shake(field.parameters(), seed)
    return field.eval()


def _shake(weights, seed):
    rng = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=rng))
