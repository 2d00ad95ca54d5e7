"""What the evaluation's tests share: small random networks, students of them, and settings for four clips."""

import json

from raydistill.config.evaluate import EvaluateConfig, LatencyConfig, PicturesConfig
from raydistill.consistency.schedule import TimeGrid
from raydistill.models.codec import build_tiny_codec
from raydistill.models.expert import add_detail
from raydistill.models.judge import Judge
from raydistill.models.text import WordVectors
from raydistill.models.wan import build_tiny_teacher
from raydistill.sampler import build_plan, with_tail
from raydistill.student import Card, save_student
from raydistill.world.pretrain import ATTRIBUTES

GRID = TimeGrid(10)
SMALL = {"dim_head": 12, "num_heads": 2, "num_layers": 1}
NULL_TEXT = WordVectors()([""])[0]


def make_student(folder, kind, seed, sources=None, path="deterministic", side=4):
    semantic = build_tiny_teacher(seed, **SMALL)
    boundary = None if kind == "single" else 0.6
    detail = add_detail(semantic, 2, 4.0, seed) if kind == "dual" else None
    card = Card(
        kind=kind,
        boundary=boundary,
        grid=GRID,
        guidance_scale=2.0,
        latent_shape=(4, 16, side, side),
        text_shape=(8, 32),
        lora=(2, 4.0) if kind == "dual" else None,
        sources=sources or {},
    )
    plans = {str(n): build_plan(n, boundary, GRID, path) for n in (1, 2)}
    if kind == "dual":
        plans["1+tail"] = with_tail(1, boundary, GRID, path)
    save_student(folder, card, semantic, detail, plans)
    return str(folder)


def make_weights(folder):
    """A teacher, a codec, a judge and three students, untrained."""
    build_tiny_teacher(0, **SMALL).transformer.save_pretrained(folder / "teacher")
    build_tiny_codec(0, width=8).save(folder / "codec")
    Judge(ATTRIBUTES, width=8).save(folder / "judge")
    make_student(folder / "dual0", "dual", 1)
    make_student(folder / "dual1", "dual", 2)
    make_student(folder / "single0", "single", 3)
    return folder


def make_config(weights, output):
    """An evaluation of them all on four clips."""
    metrics = weights / "metrics.jsonl"
    lines = [{"step": n, "stage": "semantic", "loss/consistency": 1 / n} for n in range(1, 50)]
    metrics.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return EvaluateConfig(
        teacher=str(weights / "teacher"),
        codec=str(weights / "codec"),
        judge=str(weights / "judge"),
        students={
            "dual": [str(weights / "dual0"), str(weights / "dual1")],
            "single": [str(weights / "single0")],
        },
        output=str(output),
        num_clips=4,
        reference_clips=8,
        teacher_steps=(3, 1),
        student_steps=(2, 1),
        semantic_tail=(1,),
        head_detail=(1,),
        num_draws=20,
        threads=1,
        metrics={"dual": str(metrics), "gone": str(weights / "nothing.jsonl")},
        latency=LatencyConfig(rounds=2),
        pictures=PicturesConfig(captions=2, strip_captions=2),
    )
