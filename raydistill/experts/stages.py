"""The cast of each training stage: student, target, teacher, average, companions, and their engines."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from raydistill.config.distill import DistillConfig
from raydistill.config.engine import AttentionConfig, EngineConfig
from raydistill.config.stages import StageConfig
from raydistill.consistency.schedule import RECTIFIED_FLOW, SAME_TIME, Schedule, TimeGrid
from raydistill.errors import InvalidValue
from raydistill.experts.averages import Averages, SlowCopy, follow, kept_average
from raydistill.experts.checkpoint import AVERAGES
from raydistill.experts.companions import Companion, build_companions
from raydistill.experts.engine import build_engine
from raydistill.experts.frozen import Cutter, Shards, copy_whole, frozen_config
from raydistill.experts.protocols import Engine, Saved
from raydistill.experts.semantic import Networks, Segment
from raydistill.models.casting import cast_parameters
from raydistill.models.expert import add_detail, copy_trainable
from raydistill.models.folders import boundary_ratio
from raydistill.models.guidance import guide_teacher, guide_teacher_by
from raydistill.models.lora import add_lora
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import Teacher, empty_network, is_unet
from raydistill.models.text import null_text
from raydistill.models.tuning import compile_blocks, require_attention, set_attention

STUDENT_ATTENTION, FROZEN_ATTENTION = "engine.attention.student", "engine.attention.frozen"


@dataclass
class Stage:
    """One expert's training, ready to run; every rank holds one."""

    name: str
    config: StageConfig
    nets: Networks
    segment: Segment
    engine: Engine
    student: Teacher
    target: SlowCopy | None
    """What gives the goal; None when that is the student itself."""
    average: SlowCopy | None
    """What is kept as the result; None when that is the student itself."""
    companions: dict[str, Companion]
    """Networks beside the student that look at its guesses, by name."""
    shards: Shards | None = None
    """The frozen teacher's, where it is divided over the workers."""

    def engines(self) -> dict[str, Engine]:
        """Every trainable role by name."""
        others = {name: one.engine for name, one in self.companions.items()}
        roles = {"student": self.engine, **others}
        return {name: engine for name, engine in roles.items() if engine is not None}

    def parts(self) -> dict[str, Saved]:
        """What a checkpoint keeps: the engines by role, and every moving average."""
        others = {name: (one.engine, one.slow) for name, one in self.companions.items()}
        roles = {"target": (self.engine, self.target), "average": (self.engine, self.average), **others}
        copies = {
            name: (engine, slow)
            for name, (engine, slow) in roles.items()
            if engine is not None and slow is not None
        }
        return {**self.engines(), AVERAGES: Averages(copies)}

    def update_averages(self) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta, for the target, the kept average, and companions' own."""
        follow(self.engine, [slow for slow in (self.target, self.average) if slow is not None])
        for one in self.companions.values():
            if one.engine is not None and one.slow is not None:
                follow(one.engine, [one.slow])

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines().values():
            engine.close()
        if self.shards is not None:
            self.shards.close()


def build_segment(config: DistillConfig, name: str, schedule: Schedule = RECTIFIED_FLOW) -> Segment:
    """Give the part of the path that a stage owns; raises InvalidValue if no node is the boundary."""
    grid = TimeGrid(config.grid.num_intervals, shift=config.grid.shift, last=config.grid.last)
    try:
        boundary = grid.snap(config.boundary) if config.is_dual else config.grid.last
    except InvalidValue as between:
        raise InvalidValue("boundary", between.value, between.expected) from None
    upper, lower = (boundary, config.grid.last) if name == "detail" else (1.0, boundary)
    # Stages see the same rows; another key gives them other noise.
    seed = config.seed + (1_000_003 if name == "detail" else 0)
    drawn = (config.guidance_range[0], config.guidance_range[1]) if config.guidance_range else None
    simulates = config.mix.real_share + config.mix.recorded_share < 1
    return Segment(schedule, grid, upper, lower, seed, drawn, simulates)


def require_own_networks(config: DistillConfig) -> None:
    """Check settings against the teacher's networks.

    Of a pipeline with two each expert has its own, and the boundary is the grid's highest time that the
    second one owns. A critic that looks at hidden maps needs a transformer; so do most kernels of attention.
    Raises InvalidValue.
    """
    if (ratio := boundary_ratio(config.teacher)) is not None:
        if config.experts != "dual_full":
            raise InvalidValue("experts", config.experts, "dual_full: this teacher has two networks")
        grid = TimeGrid(config.grid.num_intervals, shift=config.grid.shift, last=config.grid.last)
        below = max(t for t in grid.nodes if t < ratio)
        if abs(config.boundary - below) > SAME_TIME:
            what = f"the grid's highest time below {ratio}, where this teacher's second network takes over"
            raise InvalidValue("boundary", config.boundary, f"{below:.9g}, {what}")
    elif config.guidance_scale_2:
        raise InvalidValue("guidance_scale_2", config.guidance_scale_2, "0: this teacher has one network")
    judged = config.detail.objective.adversarial or config.detail.objective.feature_matching
    if config.is_dual and judged and is_unet(config.teacher):
        key = (
            f"detail.objective.{'adversarial' if config.detail.objective.adversarial else 'feature_matching'}"
        )
        raise InvalidValue(key, judged, "0 with a U-Net: it looks at a transformer")
    if (kernels := config.engine.attention) != AttentionConfig():
        empty = empty_network(config.teacher)
        require_attention(empty, STUDENT_ATTENTION, kernels.student, gradient=True)
        require_attention(empty, FROZEN_ATTENTION, kernels.frozen, gradient=config.is_dual and judged > 0)


@dataclass(frozen=True)
class Given:
    """What a stage is built from besides the settings; all networks on one device."""

    teacher: Teacher
    """What the student is built from; the frozen teacher too, unless `load` gives that."""
    latents: Tensor
    """Of one sample, for shapes, (1, c, f, h, w)."""
    text: Tensor
    """Of one sample, (1, l, d)."""
    semantic: Teacher | None = None
    """The finished semantic expert, for the detail stage."""
    schedule: Schedule = RECTIFIED_FLOW
    """The teacher's."""
    caption_means: tuple[Tensor, Tensor] | None = None
    """Mean pooled caption of clips and of images, for the image critic."""
    null_text: Tensor | None = None
    """The empty caption's embedding, (l, d); None: that of word vectors."""
    empty: bool = False
    """Companions have no weights either: for a plan."""
    load: Callable[..., Teacher] | None = None
    """load(dtype=, device=, take=): the frozen teacher, see `load_frozen`; `teacher` is then used up."""


def build_stage(config: DistillConfig, name: str, given: Given) -> Stage:
    """Build 'semantic', 'detail' or 'motion'.

    The engine's precision is that of student, target and teacher: teacher and semantic expert are cast in
    place, so copy what is still needed in float32.
    """
    stage = config.stage(name)
    student = build_student(config, given.teacher, given.semantic, keep=given.load is None)
    if config.engine.activation_checkpointing:
        student.enable_checkpointing()
    target = _target(config, student) if config.target.kind == "ema" else None
    student.eval()  # some U-Nets have dropout, which draws from a generator's state and makes the goal random
    accumulation = stage.accumulation(config.scale.num_workers)
    engine = build_engine(
        student, config.engine, stage.optimizer, num_steps=stage.num_steps, accumulation=accumulation
    )
    average = kept_average(engine, config.average_decay) if config.average_decay else None
    frozen, shards = _freeze_teacher(config, name, given, engine.dtype)
    _tune(frozen, config.engine)
    set_attention(student.network, STUDENT_ATTENTION, config.engine.attention.student)
    slow = _begin(target, engine, config.engine) if target else student
    null = null_text(given.text) if given.null_text is None else given.null_text
    lowest = config.guidance_range[0] if config.guidance_range else config.guidance_of(name)
    by = guide_teacher_by(frozen, null)
    # Where whole steps have one kind of path, all workers leave the teacher out alike.
    in_step = shards is not None and config.mix.per == "sample"
    nets = Networks(student, slow, guide_teacher(frozen, null, lowest), by, in_step)
    segment = build_segment(config, name, given.schedule)
    companions = build_companions(
        config, name, segment, frozen, given.latents, given.caption_means, empty=given.empty
    )
    return Stage(name, stage, nets, segment, engine, student, target, average, companions, shards)


def _begin(target: SlowCopy, engine: Engine, how: EngineConfig) -> VelocityField:
    """Let a target begin where the engine's weights do, which bfloat16 may have rounded; give its network."""
    net = cast(Teacher, target.net)
    for name, master in engine.masters():
        target.weights[name].copy_(master)
    cast_parameters(net, engine.dtype)
    _tune(net, how)
    return net


def _tune(net: Teacher, how: EngineConfig) -> None:
    """Let a frozen network compute as it is told to."""
    set_attention(net.network, FROZEN_ATTENTION, how.attention.frozen)
    if how.compile_frozen:
        compile_blocks(net.network)


def _freeze_teacher(
    config: DistillConfig, name: str, given: Given, dtype: torch.dtype
) -> tuple[Teacher, Shards | None]:
    """Give the frozen teacher in the engine's dtype, in shards where those are asked for."""
    sharded, device = config.engine.shard_teacher, given.latents.device
    offload = config.engine.offload_teacher
    if given.load is None or shares_teacher(config, name):
        frozen = given.teacher.requires_grad_(False).eval()
        cast_parameters(frozen, dtype)
    else:
        take = {"take": Cutter(frozen_config(dtype, device, offload), device)} if sharded else {}
        frozen = given.load(dtype=dtype, device=device, **take)
    return frozen, Shards(frozen, offload=offload) if sharded else None


def _target(config: DistillConfig, student: Teacher) -> SlowCopy:
    """The moving average that gives the goal; made before an engine casts the student or divides it."""
    # ZeRO 3 takes a module's weights apart; a copy must then hold its own.
    share = config.engine.zero_stage < 3
    net = copy_trainable(student) if share else copy.deepcopy(student).requires_grad_(False)
    own = dict(net.named_parameters())
    trained = {n: own[n].data for n, p in student.named_parameters() if p.requires_grad}
    return SlowCopy(trained, config.target.decay, net)


def shares_teacher(config: DistillConfig, name: str) -> bool:
    """Whether a stage's student computes with the frozen teacher's own weights: a LoRA, below ZeRO 3."""
    own = name == "detail" and config.experts == "dual_full"
    lora = config.experts == "motion" or (config.semantic.lora_rank > 0 and not own)
    return lora and config.engine.zero_stage < 3


def build_student(
    config: DistillConfig, teacher: Teacher, semantic: Teacher | None, *, keep: bool = True
) -> Teacher:
    """Build a stage's network as at step 0, requires_grad flags final; without `semantic`, the first.

    LoRA students share the weights below with the teacher, or with the semantic expert; not at ZeRO 3, which
    takes them apart. Without `keep` the networks given are the student's to use up.
    """
    own = copy.deepcopy if keep else lambda net: net
    below = own if config.engine.zero_stage == 3 else lambda net: net
    if config.experts == "motion":
        return add_lora(below(teacher), config.motion.lora_rank, config.motion.lora_alpha, config.seed)
    if semantic is None and config.semantic.lora_rank:
        return add_lora(below(teacher), config.semantic.lora_rank, config.semantic.lora_alpha, config.seed)
    # Two whole networks are both from the teacher (DCM, fig. 3).
    if semantic is None or config.experts == "dual_full":
        return own(teacher).requires_grad_(True)
    branch = config.detail
    return add_detail(below(semantic), branch.lora_rank, branch.lora_alpha, config.seed, copied=copy_whole)
