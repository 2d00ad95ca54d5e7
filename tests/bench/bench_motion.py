"""What the motion student's shortcuts save: recorded paths, features looked at once, one guided pass.

    python tests/bench/bench_motion.py [steps]

All ways run in turn in one process on the small world's shapes; the ratios are what counts.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from raydistill.config.distill import DistillConfig, EngineConfig, MixConfig, ScaleConfig
from raydistill.config.stages import MotionConfig, ObjectiveConfig
from raydistill.consistency.solver import guided
from raydistill.experts.appearance import FrameJudge
from raydistill.experts.loop import draw
from raydistill.experts.semantic import starting_point, teacher_step
from raydistill.experts.stages import Given, Stage, build_stage
from raydistill.models.teacher import load_teacher
from raydistill.models.text import null_text
from raydistill.types import Batch, Images, Origin

HARD = Path(__file__).parents[2] / "raydistill" / "world" / "weights" / "hard"
SIZE = 16


def build(appearance: float) -> Stage:
    """The stage of a motion student, with or without the image critic."""
    config = DistillConfig(
        experts="motion",
        codec=str(HARD / "codec"),
        images="images" if appearance else "",
        mix=MixConfig(),
        engine=EngineConfig(backend="torch"),
        scale=ScaleConfig(num_workers=1),
        motion=MotionConfig(objective=ObjectiveConfig(consistency=0.0, motion=1.0, appearance=appearance)),
    )
    means = (torch.zeros(32), torch.zeros(32)) if appearance else None
    example = torch.zeros(1, 4, 16, 4, 4), torch.zeros(1, 8, 32)
    return build_stage(config, "motion", Given(load_teacher(HARD / "teacher"), *example, caption_means=means))


def batch_of(stage: Stage) -> tuple[Batch, Batch]:
    """Videos with images, and the same as recorded pairs."""
    index, text = torch.arange(SIZE), torch.randn(SIZE, 8, 32)
    images = Images(torch.arange(32), torch.randn(32, 4, 1, 4, 4), torch.randn(32, 8, 32))
    fresh = Batch(index, torch.randn(SIZE, 4, 16, 4, 4), text, images=images)
    t, r, _ = stage.segment.times(index)
    x_t = starting_point(stage.nets, stage.segment, fresh, t)
    x_r = teacher_step(stage.nets, stage.segment, fresh, x_t, (t, r))
    return fresh, replace(fresh, latents=x_t, x_r=x_r, origin=torch.full((SIZE,), int(Origin.RECORDED)))


def in_turn(calls: dict[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Median seconds of each call, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(steps + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def step(stage: Stage, batch: Batch, *, again: bool = False) -> None:
    """One micro-batch of all turns; `again`: the critic decodes and looks at the same frames once more."""
    losses, seen = draw(stage, batch)
    stage.engine.backward(losses.total)
    for name, one in stage.companions.items():
        kept = seen[name]
        if again and name == "image_critic":
            judge = one.look.__self__  # pyright: ignore[reportFunctionMemberAccess]
            assert isinstance(judge, FrameJudge)
            with torch.no_grad():
                frames = judge.codec.decode_frames(
                    batch.latents, judge._picked(batch.index, batch.latents, 2)
                )
                judge.features(frames.transpose(1, 2).flatten(0, 1))
        assert one.turn is not None
        assert one.engine is not None
        one.engine.backward(one.turn(kept).total)


def main(steps: int) -> None:
    """Print passes per clip and ratios of seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain, judged = build(0.0), build(1.0)
    fresh, recorded = batch_of(plain)
    passes: list[int] = []
    teacher = plain.nets.teacher
    counted = replace(plain.nets, teacher=lambda x, t, text: (passes.append(2), teacher(x, t, text))[1])
    counts = {}
    for name, batch in (("fresh", fresh), ("recorded", recorded)):
        passes.clear()
        draw(replace(plain, nets=counted), batch)
        counts[name] = sum(passes)
    network, null = load_teacher(HARD / "teacher"), null_text(fresh.text)
    twice = replace(plain, nets=replace(plain.nets, teacher=guided(network, null, 2.0, batched=False)))
    took = in_turn(
        {
            "fresh": lambda: step(plain, fresh),
            "recorded": lambda: step(plain, recorded),
            "two passes": lambda: step(twice, fresh),
            "critic": lambda: step(judged, fresh),
            "critic, features again": lambda: step(judged, fresh, again=True),
        },
        steps,
    )
    print(f"teacher passes per clip and step: {counts['fresh']} fresh, {counts['recorded']} recorded")
    print(f"seconds of a step, recorded pairs / fresh: {took['recorded'] / took['fresh']:.2f}")
    print(f"seconds, guidance in two passes / one batched: {took['two passes'] / took['fresh']:.2f}")
    again = took["critic, features again"] / took["critic"]
    print(f"seconds, the critic's frames looked at again / once: {again:.2f}")
    print(f"seconds, with the image critic / without: {took['critic'] / took['fresh']:.2f}")
    print(f"(medians of {steps}, in turn; batch {SIZE}, 2 frames a clip, 32 images)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
