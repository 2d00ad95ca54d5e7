"""What the schema refuses of a motion student, an image critic and a mix of paths, before anything runs."""

import pytest

from raydistill.config.distill import DistillConfig, MixConfig, ScaleConfig
from raydistill.config.prepare import RecordConfig, SourceConfig
from raydistill.config.stages import (
    AppearanceConfig,
    DetailConfig,
    MotionConfig,
    ObjectiveConfig,
    SemanticConfig,
    StageConfig,
)
from raydistill.errors import InvalidValue

JUDGED = ObjectiveConfig(appearance=1.0)


def motion(**fields):
    return DistillConfig(experts="motion", **fields)


REFUSED = {
    "mix.real_share": lambda: MixConfig(real_share=1.5),
    "mix.recorded_share": lambda: MixConfig(real_share=0.7, recorded_share=0.4, trajectories="paths"),
    "mix.trajectories": lambda: MixConfig(real_share=0.5, recorded_share=0.5),
    "guidance_range": lambda: motion(guidance_range=(3.0, 2.0)),
    "guidance_scale_2": lambda: motion(guidance_scale_2=3.0),
    "guidance_scale_2 ": lambda: DistillConfig(
        experts="dual_full", guidance_scale_2=3.0, guidance_range=(2.0, 3.0)
    ),
    "guidance_scale_2  ": lambda: DistillConfig(guidance_scale_2=-1.0),
    "max_images": lambda: motion(max_images=-1),
    "max_images ": lambda: motion(max_images=100),
    "images": lambda: motion(motion=MotionConfig(objective=JUDGED)),
    "motion.appearance.images_per_step": lambda: motion(
        images="images",
        motion=MotionConfig(objective=JUDGED, appearance=AppearanceConfig(images_per_step=33)),
    ),
    "semantic.objective.appearance": lambda: DistillConfig(
        images="images", semantic=SemanticConfig(objective=JUDGED)
    ),
    "motion.objective.adversarial": lambda: motion(
        motion=MotionConfig(objective=ObjectiveConfig(adversarial=1.0))
    ),
    "objective.consistency": lambda: ObjectiveConfig(consistency=0.0),
    "objective.appearance": lambda: ObjectiveConfig(appearance=float("nan")),
    "appearance.num_frames": lambda: AppearanceConfig(num_frames=0),
    "appearance.gradient_penalty": lambda: AppearanceConfig(gradient_penalty=-1.0),
    "motion.lora_rank": lambda: MotionConfig(lora_rank=0),
    "head_decay": lambda: StageConfig(head_decay=1.0),
    "source.severity": lambda: SourceConfig(severity=2.0),
    "record.num_paths": lambda: RecordConfig(num_paths=0),
    "record.guidance_range": lambda: RecordConfig(guidance_range=(2.0, 1.0)),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_settings(key):
    with pytest.raises(InvalidValue) as caught:
        REFUSED[key]()
    assert caught.value.key == key.strip()


def test_images_that_nothing_looks_at_are_refused():
    with pytest.raises(InvalidValue, match="nothing looks at the images"):
        motion(images="images")


def test_two_experts_take_no_simulated_paths():
    with pytest.raises(InvalidValue, match="experts=motion's or =single's"):
        DistillConfig(mix=MixConfig(real_share=0.5))
    DistillConfig(experts="single", mix=MixConfig(real_share=0.5))


def test_stages_by_kind_of_expert():
    assert DistillConfig().stages == ("semantic", "detail")
    assert DistillConfig(experts="single").stages == ("semantic",)
    assert motion().stages == ("motion",)
    assert motion().stage("motion") == MotionConfig()


def test_only_the_stages_of_a_run_are_looked_at():
    """A motion run does not mind what the experts' batches are."""
    motion(semantic=SemanticConfig(global_batch=7), detail=DetailConfig(global_batch=7))


def test_images_divide_among_workers_and_micro_batches():
    stage = MotionConfig(
        global_batch=32, micro_batch=4, objective=JUDGED, appearance=AppearanceConfig(images_per_step=16)
    )
    assert stage.accumulation(2) == 4
    with pytest.raises(InvalidValue, match="1 workers x 8 micro-batches") as caught:
        MotionConfig(
            micro_batch=4, objective=JUDGED, appearance=AppearanceConfig(images_per_step=12)
        ).accumulation(1)
    assert caught.value.key == "appearance.images_per_step"
    assert DistillConfig(experts="motion", images="i", motion=stage, scale=ScaleConfig(num_workers=2)).stage(
        "motion"
    )
