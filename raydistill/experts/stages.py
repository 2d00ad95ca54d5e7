"""The cast of each training stage: student, target, teacher, average, critic, and their engines."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raydistill.config.distill import DetailConfig, DistillConfig, StageConfig
from raydistill.consistency.average import moving_average_
from raydistill.consistency.schedule import RectifiedFlow, TimeGrid
from raydistill.consistency.solver import guided
from raydistill.experts.detail import Judges
from raydistill.experts.engine import Engine, build_engine
from raydistill.experts.semantic import Networks, Segment
from raydistill.models.critic import TokenCritic
from raydistill.models.expert import add_detail, copy_trainable
from raydistill.models.wan import WanField


@dataclass
class Stage:
    """One expert's training, ready to run; every rank holds one."""

    name: str
    config: StageConfig
    nets: Networks
    segment: Segment
    engine: Engine
    student: WanField
    target: WanField | None
    """The slow copy; None when the target is the student itself."""
    target_decay: float
    average: WanField | None
    """What is kept as the result; None when that is the student itself."""
    average_decay: float
    judges: Judges | None = None
    critic_engine: Engine | None = None

    @property
    def result(self) -> WanField:
        """The network to keep."""
        return self.student if self.average is None else self.average

    def engines(self) -> dict[str, Engine]:
        """Every trainable role by name."""
        roles = {"student": self.engine, "critic": self.critic_engine}
        return {name: engine for name, engine in roles.items() if engine is not None}

    def _copies(self) -> Iterator[tuple[str, WanField, float]]:
        if self.target is not None:
            yield "target", self.target, self.target_decay
        if self.average is not None:
            yield "average", self.average, self.average_decay

    def update_averages(self) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta, for the target and the kept average."""
        names = self.engine.trainable_parameters
        with self.engine.gathered(names.values()):
            for _, slow, decay in self._copies():
                own = dict(slow.named_parameters())
                # Early on a slow average is mostly the starting point; let it follow the student at first.
                mu = min(decay, (1 + self.engine.steps) / (10 + self.engine.steps))
                moving_average_([own[n].data for n in names], [p.detach() for p in names.values()], mu)

    def save_averages(self, path: Path) -> None:
        """Write the slow copies' own weights."""
        tensors: dict[str, Tensor] = {}
        for kind, slow, _ in self._copies():
            own = dict(slow.named_parameters())
            tensors |= {f"{kind}/{n}": own[n].data.contiguous() for n in self.engine.trainable_parameters}
        save_file(tensors, path)

    def load_averages(self, path: Path) -> None:
        """Inverse of `save_averages`."""
        tensors = load_file(path)
        for kind, slow, _ in self._copies():
            own = dict(slow.named_parameters())
            for name in self.engine.trainable_parameters:
                own[name].data.copy_(tensors[f"{kind}/{name}"])

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines().values():
            engine.close()


def build_segment(config: DistillConfig, name: str) -> Segment:
    """Give the part of the path that a stage owns; raises InvalidValue if no node is the boundary."""
    grid = TimeGrid(config.grid.num_intervals, shift=config.grid.shift, last=config.grid.last)
    boundary = config.grid.last if config.experts == "single" else grid.snap(config.boundary)
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
    """Build 'semantic' (semantic is None) or 'detail'; `latents` and `text` are one sample, for shapes."""
    stage: StageConfig = config.semantic if name == "semantic" else config.detail
    student = build_student(config, teacher, semantic)
    if config.engine.activation_checkpointing:
        student.transformer.enable_gradient_checkpointing()
    share = (
        config.engine.zero_stage < 3
    )  # ZeRO 3 takes a module's weights apart; copies must then hold their own
    make_copy = copy_trainable if share else lambda net: copy.deepcopy(net).requires_grad_(False)
    target = make_copy(student) if config.target.kind == "ema" else None
    average = make_copy(student) if config.average_decay else None
    student.train()
    accumulation = stage.accumulation(config.scale.num_workers)
    engine = build_engine(
        student, config.engine, stage.optimizer, num_steps=stage.num_steps, accumulation=accumulation
    )
    frozen = teacher.requires_grad_(False).eval()
    null_text = torch.zeros_like(text[0])
    nets = Networks(
        student, target if target is not None else student, guided(frozen, null_text, config.guidance_scale)
    )
    built = Stage(
        name, stage, nets, build_segment(config, name), engine,
        student, target, config.target.decay, average, config.average_decay,
    )  # fmt: skip
    if isinstance(stage, DetailConfig) and (stage.objective.adversarial or stage.objective.feature_matching):
        built.judges, built.critic_engine = _build_judges(config, stage, frozen, latents, accumulation)
    return built


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
            critic = TokenCritic(len(blocks), dim, stage.critic.channels)
        engine = build_engine(
            critic,
            config.engine,
            stage.critic.optimizer,
            num_steps=stage.num_steps,
            accumulation=accumulation,
        )
    return Judges(teacher, critic, blocks, teacher.token_grid(latents), stage.critic.real), engine
