"""The loop stops before a number that is not finite reaches an average or a checkpoint."""

import math
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from raydistill.config.distill import DistillConfig, EngineConfig, ScaleConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, OptimizerConfig, SemanticConfig
from raydistill.errors import NonFiniteLoss
from raydistill.experts.loop import distill, require_finite_gradient
from raydistill.experts.stages import Given, build_stage
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

SIZES = {"num_steps": 4, "global_batch": 4, "micro_batch": 2, "optimizer": OptimizerConfig(warmup_steps=1)}
CONFIG = DistillConfig(
    engine=EngineConfig(backend="torch"),
    scale=ScaleConfig(num_workers=1),
    semantic=SemanticConfig(**SIZES),
    detail=DetailConfig(**SIZES, lora_rank=2, objective=ObjectiveConfig(adversarial=0.1)),
)
SHAPE, TEXT = (4, 4, 4, 4), (3, 32)


def batches():
    rng = torch.Generator().manual_seed(0)
    for at in count(0, 2):
        latents, text = (torch.randn(2, *shape, generator=rng) for shape in (SHAPE, TEXT))
        yield Batch(torch.arange(at, at + 2), latents, text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("role", "term"), {"student": "gradient norm", "critic": "gradient norm of the critic"}.items()
)
def test_a_gradient_that_is_not_finite_is_never_saved(role, term, value):
    """Though every loss is finite, and whatever the engine made of it."""
    teacher = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    example = torch.zeros(1, *SHAPE), torch.zeros(1, *TEXT)
    stage = build_stage(CONFIG, "detail", Given(teacher, *example, teacher))
    saved, averaged = [], []
    stage.update_averages = lambda: averaged.append(stage.engine.steps)

    def save(step):
        saved.append(step)
        weight = next(iter(stage.engines()[role].trainable_parameters.values()))
        weight.register_hook(lambda gradient: gradient * value)

    with pytest.raises(NonFiniteLoss, match="the last checkpoint is intact") as caught:
        distill(stage, batches(), report_every=1, save_every=1, report=lambda *_: None, save=save)
    assert (caught.value.term, caught.value.step) == (term, 1)
    assert saved == averaged == [1]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0, None])
def test_every_engines_word_for_not_finite_is_understood(norm):
    """DeepSpeed says inf or -1, and may have left the step out."""
    with pytest.raises(NonFiniteLoss, match=r"'gradient norm' is (nan|inf) at step 6"):
        require_finite_gradient(SimpleNamespace(steps=7, grad_norm=norm), "gradient norm")
    require_finite_gradient(SimpleNamespace(steps=7, grad_norm=0.0), "gradient norm")
