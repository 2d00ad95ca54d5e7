"""What `gpu.py` measures: sections, each with one or more ways to do the same work, the reference first."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_setup import Figures, Setup

from raydistill.consistency.schedule import RECTIFIED_FLOW
from raydistill.consistency.solver import guided, solve
from raydistill.experts.detail import CriticInputs
from raydistill.experts.plain_engine import cast_parameters
from raydistill.experts.semantic import Losses, add_up, consistency_pair, consistency_terms
from raydistill.experts.stages import Stage, build_segment
from raydistill.models.expert import add_detail
from raydistill.models.guidance import guide_teacher
from raydistill.models.lora import merge
from raydistill.models.text import null_text
from raydistill.models.wan import WanField
from raydistill.sampler import build_plan, sample
from raydistill.types import Batch

Ways = dict[str, Callable[[], Figures]]
GUIDANCE = 6.0


def two_passes(stage: Stage, teacher: WanField, batch: Batch) -> None:
    """Guide in two passes, as pipelines do."""
    field = guided(teacher, null_text(batch.text), GUIDANCE, batched=False)
    stage.nets = replace(stage.nets, teacher=field)


def seen_again(stage: Stage, teacher: WanField, batch: Batch) -> None:
    """Compute the critic's features again in its own turn, as the published code does."""
    critic, stride = stage.companions["critic"], stage.config.critic.stride
    turn, blocks = critic.turn, range(0, teacher.num_blocks, stride)
    assert turn is not None

    def again(seen: CriticInputs) -> Losses:
        with torch.no_grad():
            maps = [teacher.features(batch.latents, seen.t, batch.text, blocks)[0] for _ in range(2)]
        return turn(CriticInputs(maps[0], maps[1], seen.t))

    stage.companions["critic"] = replace(critic, turn=again)


def draw_at_once(stage: Stage, batch: Batch) -> tuple[Losses, dict[str, Any]]:
    """One draw with one graph through student, teacher and critic, held until a single backward pass.

    The critic's weights are frozen for it, as is usual: the product leaves them alone by taking a gradient
    with respect to the guess only.
    """
    objective, critic = stage.config.objective, stage.companions["critic"]
    assert critic.engine is not None
    pair = consistency_pair(stage.nets, stage.segment, batch)
    critic.engine.module.requires_grad_(False)
    said, kept = critic.look(batch, pair, pair.guess)
    losses = add_up({**consistency_terms(pair, objective), **said})
    critic.engine.module.requires_grad_(True)
    return losses, {"critic": kept}


def teacher_samples(setup: Setup) -> Figures:
    """The guided teacher along all nodes of its grid, two passes a step in one batch."""
    before, batch = setup.held(), setup.batch()
    segment = build_segment(setup.config(), "semantic")
    teacher = cast_parameters(setup.network(0), setup.dtype)
    field = guide_teacher(teacher, null_text(batch.text), GUIDANCE)
    times, text = segment.grid.times, batch.text

    @torch.no_grad()
    def follow(along: torch.Tensor) -> None:
        solve(RECTIFIED_FLOW, field, batch.latents, along, text)

    figures = setup.repeated(lambda: follow(times[:2]), before)  # one step, for the peak
    return figures | {"seconds": setup.seconds(lambda: follow(times))}


def student_samples(setup: Setup) -> Figures:
    """Both experts in four steps without guidance, the LoRA folded in."""
    before, batch, config = setup.held(), setup.batch(), setup.config()
    segment = build_segment(config, "semantic")
    semantic = cast_parameters(setup.network(1), setup.dtype)
    detail = merge(add_detail(semantic, config.detail.lora_rank, config.detail.lora_alpha, 0))
    fields = {"semantic": semantic, "detail": cast_parameters(detail, setup.dtype).eval()}
    plan = build_plan(4, segment.lower, segment.grid)

    return setup.repeated(lambda: sample(fields, RECTIFIED_FLOW, plan, batch.latents, batch.text), before)


def semantic(setup: Setup) -> Ways:
    """The semantic expert's step."""
    return {"step": lambda: setup.step("semantic", planned=True)}


def detail(setup: Setup) -> Ways:
    """The detail expert's, with critic and feature matching."""
    return {"step": lambda: setup.step("detail", planned=True)}


def sampling(setup: Setup) -> Ways:
    """Latency of a clip's latents."""
    steps = setup.config().grid.num_intervals
    return {
        "student, 4 steps": lambda: student_samples(setup),
        f"teacher, {steps} steps": lambda: teacher_samples(setup),
    }


def guidance(setup: Setup) -> Ways:
    """The teacher's guided step, semantic stage."""
    return {
        "one pass over both": lambda: setup.step("semantic"),
        "two passes": lambda: setup.step("semantic", change=two_passes),
    }


def reuse(setup: Setup) -> Ways:
    """The critic's features in its own turn."""
    return {
        "features reused": lambda: setup.step("detail"),
        "computed again": lambda: setup.step("detail", change=seen_again),
    }


def freeing(setup: Setup) -> Ways:
    """Graphs of the loss terms, detail stage."""
    return {
        "freed between terms": lambda: setup.step("detail"),
        "held until the end": lambda: setup.step("detail", drawn=draw_at_once),
    }


def checkpointing(setup: Setup) -> Ways:
    """Activations, semantic stage; of shorter clips where all of a whole one's would not fit."""
    off, how = "engine.activation_checkpointing=false", {"planned": True, "frames": setup.size.frames_kept}
    return {
        "checkpoints": lambda: setup.step("semantic", **how),
        "all kept": lambda: setup.step("semantic", off, **how),
    }


def attention(setup: Setup) -> Ways:
    """Kernels of both roles, semantic stage."""

    def of(name: str) -> Callable[[], Figures]:
        chosen = (f"engine.attention.student={name}", f"engine.attention.frozen={name}")
        return lambda: setup.step("semantic", *chosen)

    return {name: of(name) for name in setup.size.attention}


def compiled(setup: Setup) -> Ways:
    """The frozen teacher, semantic stage; the first step has the compiling."""
    return {
        "eager": lambda: setup.step("semantic"),
        "frozen compiled": lambda: setup.step("semantic", "engine.compile_frozen=true"),
    }


def engine(setup: Setup) -> Ways:
    """DeepSpeed's ZeRO on one device over plain torch, semantic stage."""

    return {
        "torch": lambda: setup.step("semantic", planned=True),
        "DeepSpeed, ZeRO 2": lambda: setup.step("semantic", "engine.backend=deepspeed", planned=True),
    }


SECTIONS: dict[str, Callable[[Setup], Ways]] = {
    one.__name__: one
    for one in (
        *(semantic, detail, sampling, engine, compiled, guidance, reuse, freeing, checkpointing, attention),
    )
}
