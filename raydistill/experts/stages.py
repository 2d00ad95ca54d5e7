"""The cast of each training stage: student, target, teacher, average, critic, and their engines."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raydistill.config.distill import DetailConfig, DistillConfig, StageConfig
from raydistill.consistency.average import moving_average_
from raydistill.consistency.schedule import RectifiedFlow, TimeGrid
from raydistill.consistency.solver import guided
from raydistill.errors import InvalidValue
from raydistill.experts.detail import Judges
from raydistill.experts.engine import Engine, build_engine
from raydistill.experts.plain_engine import cast_parameters
from raydistill.experts.semantic import Networks, Segment
from raydistill.models.critic import TokenCritic
from raydistill.models.expert import add_detail, copy_trainable
from raydistill.models.wan import WanField


@dataclass
class SlowCopy:
    """A moving average of what the student trains: in float32, whatever the networks compute in.

    In bfloat16 an average would stand still: its steps are smaller than the spacing of its numbers.
    """

    weights: dict[str, Tensor]
    """By the student's parameter names; float32, whole on every rank."""
    decay: float
    net: WanField | None = None
    """The network that computes with them, in the student's dtype; None when nothing does."""

    def publish(self) -> None:
        """Copy the weights into the network, where it does not hold these very tensors."""
        own = dict(self.net.named_parameters()) if self.net is not None else {}
        for name, weight in self.weights.items() if own else ():
            if own[name].dtype != weight.dtype:
                own[name].data.copy_(weight)


@dataclass
class Stage:
    """One expert's training, ready to run; every rank holds one."""

    name: str
    config: StageConfig
    nets: Networks
    segment: Segment
    engine: Engine
    student: WanField
    target: SlowCopy | None
    """What gives the goal; None when that is the student itself."""
    average: SlowCopy | None
    """What is kept as the result; None when that is the student itself."""
    judges: Judges | None = None
    critic_engine: Engine | None = None

    def engines(self) -> dict[str, Engine]:
        """Every trainable role by name."""
        roles = {"student": self.engine, "critic": self.critic_engine}
        return {name: engine for name, engine in roles.items() if engine is not None}

    def slow_copies(self) -> dict[str, SlowCopy]:
        """Every moving average by name."""
        roles = {"target": self.target, "average": self.average}
        return {name: slow for name, slow in roles.items() if slow is not None}

    def update_averages(self) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta, for the target and the kept average, tensor by tensor."""
        copies = self.slow_copies().values()
        for name, weight in self.engine.masters() if copies else ():
            for slow in copies:
                decay = slow.decay
                # Early on a slow average is mostly the starting point; let it follow the student at first.
                mu = min(decay, (1 + self.engine.steps) / (10 + self.engine.steps))
                moving_average_([slow.weights[name]], [weight], mu)
        for slow in copies:
            slow.publish()

    def save_averages(self, path: Path) -> None:
        """Write the moving averages."""
        copies = self.slow_copies().items()
        save_file(
            {f"{kind}/{n}": w.contiguous() for kind, slow in copies for n, w in slow.weights.items()}, path
        )

    def load_averages(self, path: Path) -> None:
        """Inverse of `save_averages`."""
        tensors = load_file(path)
        for kind, slow in self.slow_copies().items():
            for name, weight in slow.weights.items():
                weight.copy_(tensors[f"{kind}/{name}"])
            slow.publish()

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines().values():
            engine.close()


def build_segment(config: DistillConfig, name: str) -> Segment:
    """Give the part of the path that a stage owns; raises InvalidValue if no node is the boundary."""
    grid = TimeGrid(config.grid.num_intervals, shift=config.grid.shift, last=config.grid.last)
    try:
        boundary = config.grid.last if config.experts == "single" else grid.snap(config.boundary)
    except InvalidValue as between:
        raise InvalidValue("boundary", between.value, between.expected) from None
    upper, lower = (1.0, boundary) if name == "semantic" else (boundary, config.grid.last)
    # Stages see the same rows; another key gives them other noise.
    return Segment(
        RectifiedFlow(), grid, upper, lower, config.seed + (0 if name == "semantic" else 1_000_003)
    )


def build_stage(
    config: DistillConfig,
    name: str,
    teacher: WanField,
    semantic: WanField | None,
    latents: Tensor,
    text: Tensor,
) -> Stage:
    """Build 'semantic' (semantic is None) or 'detail'; `latents` and `text` are one sample, for shapes.

    All networks must be on the device of `latents`. The engine's precision is that of them all: teacher and
    semantic expert are cast in place, so copy what is still needed in float32.
    """
    stage: StageConfig = config.semantic if name == "semantic" else config.detail
    student = build_student(config, teacher, semantic)
    if config.engine.activation_checkpointing:
        student.transformer.enable_gradient_checkpointing()
    target, average = _build_slow_copies(config, student)
    student.train()
    accumulation = stage.accumulation(config.scale.num_workers)
    engine = build_engine(
        student, config.engine, stage.optimizer, num_steps=stage.num_steps, accumulation=accumulation
    )
    frozen = teacher.requires_grad_(False).eval()
    for net in (frozen, target.net) if target and target.net else (frozen,):
        cast_parameters(net, engine.dtype)
    slow = target.net if target and target.net else student
    teaching = guided(frozen, torch.zeros_like(text[0]), config.guidance_scale)
    nets, segment = Networks(student, slow, teaching), build_segment(config, name)
    built = Stage(name, stage, nets, segment, engine, student, target, average)
    if isinstance(stage, DetailConfig) and (stage.objective.adversarial or stage.objective.feature_matching):
        built.judges, built.critic_engine = _build_judges(config, stage, frozen, latents, accumulation)
    return built


def _build_slow_copies(config: DistillConfig, student: WanField) -> tuple[SlowCopy | None, SlowCopy | None]:
    """Target and kept average as they begin; before an engine casts the student or takes it apart."""
    target = average = None
    trained = {n: p.data for n, p in student.named_parameters() if p.requires_grad}
    if config.target.kind == "ema":
        # ZeRO 3 takes a module's weights apart; a copy must then hold its own.
        share = config.engine.zero_stage < 3
        net = copy_trainable(student) if share else copy.deepcopy(student).requires_grad_(False)
        own = dict(net.named_parameters())
        target = SlowCopy({n: own[n].data for n in trained}, config.target.decay, net)
    if config.average_decay:
        average = SlowCopy({n: w.clone() for n, w in trained.items()}, config.average_decay)
    return target, average


def build_student(config: DistillConfig, teacher: WanField, semantic: WanField | None) -> WanField:
    """Build a stage's network as at step 0, requires_grad flags final; without `semantic`, the first."""
    if semantic is None:
        return copy.deepcopy(teacher).requires_grad_(True)
    if config.experts == "dual_full":  # two whole networks, both from the teacher (DCM, fig. 3)
        return copy.deepcopy(teacher).requires_grad_(True)
    if config.engine.zero_stage == 3:
        semantic = copy.deepcopy(semantic)  # its weights will be taken apart
    return add_detail(semantic, config.detail.lora_rank, config.detail.lora_alpha, config.seed)


def _build_judges(
    config: DistillConfig, stage: DetailConfig, teacher: WanField, latents: Tensor, accumulation: int
) -> tuple[Judges, Engine | None]:
    blocks = range(0, teacher.num_blocks, stage.critic.stride)
    critic: nn.Module | None = None
    engine: Engine | None = None
    if stage.objective.adversarial:
        dim = teacher.transformer.proj_out.in_features
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            critic = TokenCritic(len(blocks), dim, stage.critic.channels).to(latents.device)
        engine = build_engine(
            critic,
            config.engine,
            stage.critic.optimizer,
            num_steps=stage.num_steps,
            accumulation=accumulation,
        )
    return Judges(teacher, critic, blocks, teacher.token_grid(latents), stage.critic.real), engine
