"""Networks beside the student: the token critic, the image critic, the learned motion representation."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.config.distill import DistillConfig
from raydistill.config.stages import DetailConfig, OptimizerConfig, StageConfig
from raydistill.errors import InvalidValue
from raydistill.experts.appearance import FrameJudge
from raydistill.experts.averages import SlowCopy
from raydistill.experts.detail import Judges, critic_losses, detail_look
from raydistill.experts.engine import build_engine
from raydistill.experts.motion import LearnedMotion
from raydistill.experts.protocols import Engine
from raydistill.experts.semantic import Look, Losses, Segment
from raydistill.models.codec import ClipCodec, FrameCodec, load_codec
from raydistill.models.critic import TokenCritic
from raydistill.models.frame_critic import FrameCritic
from raydistill.models.frame_features import FrameFeatures, load_frame_features
from raydistill.models.motion_head import build_motion_head
from raydistill.models.teacher import Teacher
from raydistill.models.unet import UNetField


@dataclass(frozen=True)
class Companion:
    """Looks at every guess of the student, and may learn from it in a turn of its own."""

    look: Look
    turn: Callable[[Any], Losses] | None = None
    """Loss of its own turn, from what the look kept; None where nothing is trained."""
    engine: Engine | None = None
    slow: SlowCopy | None = None
    """Moving average of what the engine trains."""
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    """Networks that it looks through and that no other role has, by name."""


def build_companions(
    config: DistillConfig,
    name: str,
    segment: Segment,
    teacher: Teacher,
    latents: Tensor,
    caption_means: tuple[Tensor, Tensor] | None,
    *,
    empty: bool = False,
) -> dict[str, Companion]:
    """Build those whose terms have a weight in the stage's objective; `empty`: without loading weights."""
    stage = config.stage(name)
    objective, companions = stage.objective, dict[str, Companion]()
    if isinstance(stage, DetailConfig) and (objective.adversarial or objective.feature_matching):
        companions["critic"] = _token_critic(config, stage, segment, teacher, latents)
    if objective.motion and objective.representation in ("learned", "learned_conv"):
        companions["motion_head"] = _motion_head(config, stage, latents)
    if objective.appearance:
        if caption_means is None:
            raise InvalidValue("images", config.images, "an artifact of images for the image critic")
        seen = load_frame_features(stage.appearance.features, weights=not empty)
        codec = load_codec(config.codec, weights=not empty)
        companions["image_critic"] = _image_critic(
            config, stage, segment.seed, caption_means, (seen.to(latents.device), codec.to(latents.device))
        )
    return companions


def _engine(
    config: DistillConfig, stage: StageConfig, role: str, module: nn.Module, optimizer: OptimizerConfig
) -> Engine:
    """Take a companion into an engine of its role's settings."""
    how = config.engine.of(role)
    rounds = stage.accumulation(config.scale.num_workers)
    return build_engine(module, how, optimizer, num_steps=stage.num_steps, accumulation=rounds)


def _token_critic(
    config: DistillConfig, stage: DetailConfig, segment: Segment, teacher: Teacher, latents: Tensor
) -> Companion:
    """DCM's critic on the teacher's hidden maps; feature matching alone needs no critic."""
    if isinstance(teacher, UNetField):
        weight = stage.objective.adversarial or stage.objective.feature_matching
        raise InvalidValue(
            "detail.objective.adversarial", weight, "0 with a U-Net: it looks at a transformer"
        )
    if config.engine.activation_checkpointing:
        teacher.enable_checkpointing()  # gradients pass through it, to the student's guess
    blocks = range(0, teacher.num_blocks, stage.critic.stride)
    grid = teacher.token_grid(latents)
    if not stage.objective.adversarial:
        judges = Judges(teacher, None, blocks, grid, stage.critic.real)
        return Companion(detail_look(judges, segment, stage.objective))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        critic = TokenCritic(len(blocks), teacher.hidden_size, stage.critic.channels).to(latents.device)
    engine = _engine(config, stage, "critic", critic, stage.critic.optimizer)
    judges = Judges(teacher, critic, blocks, grid, stage.critic.real)
    turn = lambda seen: critic_losses(critic, seen, grid)  # noqa: E731
    return Companion(detail_look(judges, segment, stage.objective), turn, engine)


def _motion_head(config: DistillConfig, stage: StageConfig, latents: Tensor) -> Companion:
    """MCM's learned representation, optimized as the student is."""
    kind = stage.objective.representation
    assert kind in ("learned", "learned_conv")
    head = build_motion_head(kind, latents.shape[1], config.seed).to(latents.device)
    slow = copy.deepcopy(head).requires_grad_(False)
    average = SlowCopy({n: p.data for n, p in slow.named_parameters()}, stage.head_decay, slow)
    engine = _engine(config, stage, "motion_head", head, stage.optimizer)
    motion = LearnedMotion(head, slow, stage.objective)
    return Companion(motion.look, motion.turn, engine, average)


def _image_critic(
    config: DistillConfig,
    stage: StageConfig,
    seed: int,
    caption_means: tuple[Tensor, Tensor],
    through: tuple[FrameFeatures, FrameCodec | ClipCodec],
) -> Companion:
    """MCM's discriminator of frames."""
    how, (features, codec) = stage.appearance, through
    device = next(features.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        critic = FrameCritic(features.widths, len(caption_means[0]), how.channels).to(device)
    engine = _engine(config, stage, "image_critic", critic, how.optimizer)
    judge = FrameJudge(critic, codec, features, how, stage.objective.appearance, seed, caption_means)
    return Companion(judge.look, judge.turn, engine, frozen={"frame features": features, "codec": codec})
