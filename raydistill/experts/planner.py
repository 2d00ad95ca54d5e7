"""What a run will take, found without weights: memory by role, passes, operations, hours, money.

Networks are made of their configs alone, on torch's meta device, where tensors have shapes and no data, and
one micro-batch goes through the very code that trains: so activations are counted, not estimated, for any
architecture and setting.

What engines add is reckoned, from DeepSpeed's own bookkeeping:

* weights in the engine's precision, divided over workers at ZeRO 3, the teacher's where it is sharded, and
  what of those is gathered at a time;
* gradients and buckets; float32 masters and AdamW's two moments, in host memory where offloaded; what an
  update takes for a moment, when activations are gone: see `holding`;
* targets and averages in float32: whole on every worker, but for the average that is kept at ZeRO 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.config.distill import DistillConfig, MixConfig
from raydistill.config.engine import EngineConfig
from raydistill.experts.counting import CountedOperations, LiveBytes, memory_efficient_attention
from raydistill.experts.holding import holding
from raydistill.experts.loop import draw
from raydistill.experts.stages import Given, Stage, build_stage, build_student
from raydistill.models.folders import boundary_ratio
from raydistill.models.teacher import Teacher, empty_teacher, load_schedule
from raydistill.models.unet import UNetField
from raydistill.types import Batch, Images

GIB = 2**30


@dataclass(frozen=True)
class RoleMemory:
    """One network on one worker; bytes."""

    name: str
    parameters: int
    """In it, those that it shares with a role above included."""
    trained: int
    weights: int = 0
    """Not those that it shares."""
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    gathered: int = 0
    """Of a network that is divided, what is whole at a time during a pass, at most."""
    update: int = 0
    """Of a trained one, gradients and all that is there for a moment when they are reduced or step."""
    host: int = 0
    """In the machine's memory, not the device's."""

    @property
    def device(self) -> int:
        """All of it that is on the device."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.gathered

    @property
    def more(self) -> int:
        """Bytes by which its update takes more than `device`; below 0 where it takes less."""
        return self.update - self.gradients - self.gathered


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    roles: tuple[RoleMemory, ...]
    activations: int
    """Bytes, at the moment when most are held."""
    tokens: int
    """Of one clip, as the network sees it; 0 for a U-Net."""
    passes: dict[str, float]
    """Forward passes of each network for one sample of one step; a guided pass in one batch counts as 2."""
    flops: float
    """Of one sample, everything included."""
    samples: int
    """Of all steps."""
    workers: int
    loading: int
    """Bytes before an engine takes a student that is read whole, in float32, and its target."""
    kept: int = 0
    """Bytes of activations that are still there when companions update."""

    @property
    def update(self) -> tuple[int, str]:
        """Bytes that come to the roles at most when one of them updates, and which: they do it in turns."""
        trained = [role for role in self.roles if role.trained]
        return max((role.more + (self.kept if role.name != "student" else 0), role.name) for role in trained)

    @property
    def device(self) -> int:
        """Bytes on a worker's device at the worst moment."""
        most = max(self.activations, self.update[0])
        return max(sum(role.device for role in self.roles) + most, self.loading)

    @property
    def host(self) -> int:
        """Bytes in a machine's memory for one worker."""
        return sum(role.host for role in self.roles)

    def hours(self, tflops: float) -> float:
        """Hours of all workers together, at this rate of each."""
        return self.flops * self.samples / (tflops * 1e12) / 3600


@dataclass(frozen=True)
class _Measured:
    """Of one micro-batch."""

    held: int
    """Bytes at the peak, gradients of parameters left out."""
    kept: int
    """Bytes after a companion's backward pass."""
    passes: dict[str, float]
    """Forward passes of each network for one sample."""
    flops: float
    """Of one sample."""


def plan_stage(
    config: DistillConfig,
    name: str,
    latents: Sequence[int],
    text: Sequence[int],
) -> StagePlan:
    """Plan one stage for clips of these latents (c, f, h, w) and captions (l, d); raises as building does."""
    make = partial(torch.zeros, device="meta")
    with torch.device("meta"):
        teacher = empty_teacher(config.teacher, name, config.guidance_scale)
        semantic = _semantic(config, teacher) if name == "detail" else None
    given = Given(
        teacher,
        make(1, *latents),
        make(1, *text),
        semantic,
        load_schedule(config.teacher),
        caption_means=(make(text[-1]), make(text[-1])),
        empty=True,
    )
    with torch.device("meta"):
        stage = build_stage(_alone(config), name, given)
    roles, batch = tuple(_roles(config, stage, teacher)), _batch(config, name, latents, text)
    found = _measured(config, stage, teacher, batch)
    grid = (0,) if isinstance(teacher, UNetField) else teacher.token_grid(given.latents)
    samples = stage.config.num_steps * stage.config.global_batch
    return StagePlan(
        name,
        roles,
        found.held,
        math.prod(grid),
        found.passes,
        found.flops,
        samples,
        config.scale.num_workers,
        0 if config.student_in_shards else _loading(stage),
        found.kept,
    )


def _loading(stage: Stage) -> int:
    """Bytes of the student as it is read whole, and of a target, which is copied of it."""
    target = stage.target.weights.values() if stage.target is not None else ()
    return _bytes((*stage.student.parameters(), *target), set(), 4)


def _alone(config: DistillConfig) -> DistillConfig:
    """Settings of a step in this process: no engine that shards, every sample a video's."""
    engine = config.engine
    return replace(
        config,
        mix=MixConfig(),
        # Kernels of attention as they come: no other runs without data; all but _native_math keep as little.
        engine=EngineConfig(
            backend="torch",
            zero_stage=engine.zero_stage,
            precision=engine.precision,
            activation_checkpointing=engine.activation_checkpointing,
        ),
        scale=replace(config.scale, num_workers=1),
    )


def _semantic(config: DistillConfig, teacher: Teacher) -> Teacher:
    """Build the finished semantic expert, as a worker does."""
    if boundary_ratio(config.teacher) is not None:
        teacher = empty_teacher(config.teacher, "semantic")
    return build_student(config, teacher, None).requires_grad_(False).eval()


def _batch(config: DistillConfig, name: str, latents: Sequence[int], text: Sequence[int]) -> Batch:
    """One micro-batch of nothing."""
    stage = config.stage(name)
    size, images, make = stage.micro_batch, None, partial(torch.zeros, device="meta")
    if stage.objective.appearance:
        count = stage.appearance.images_per_step // (
            config.scale.num_workers * stage.accumulation(config.scale.num_workers)
        )
        single = (latents[0], 1, *latents[2:])
        images = Images(torch.arange(count), make(count, *single), make(count, *text))
    return Batch(torch.arange(size), make(size, *latents), make(size, *text), images=images)


def _measured(config: DistillConfig, stage: Stage, teacher: nn.Module, batch: Batch) -> _Measured:
    """Run a micro-batch and see."""
    passes: dict[str, float] = {}

    def seen(role: str, _net: nn.Module, args: tuple[Any, ...]) -> None:
        passes[role] = passes.get(role, 0) + len(args[0]) / len(batch.index)

    nets = {"teacher": teacher, "student": stage.student}
    if stage.target is not None and stage.target.net is not None:
        nets["target"] = stage.target.net
    hooks = [net.register_forward_pre_hook(partial(seen, role)) for role, net in nets.items()]
    kept = [0]
    with memory_efficient_attention(), LiveBytes() as live, CountedOperations() as counted:
        _one_micro_batch(stage, batch, partial(_leave_out, live), lambda: kept.append(live.live))
    for hook in hooks:
        hook.remove()
    flops = counted.total / len(batch.index)
    if simulated := 1 - config.mix.real_share - config.mix.recorded_share:
        with memory_efficient_attention(), CountedOperations() as counted, torch.no_grad():
            stage.student(batch.latents, torch.ones(len(batch.index)), batch.text)
        flops += simulated * counted.total / len(batch.index)
        passes["target" if "target" in nets else "student"] += simulated
    if recorded := config.mix.recorded_share:
        with memory_efficient_attention(), CountedOperations() as counted, torch.no_grad():
            teacher(batch.latents, torch.ones(len(batch.index)), batch.text)
        flops -= recorded * passes["teacher"] * counted.total / len(batch.index)
        passes["teacher"] *= 1 - recorded
    return _Measured(live.peak, max(kept), passes, flops)


def _one_micro_batch(
    stage: Stage, batch: Batch, on_gradient: Callable[[Tensor], None], on_turn: Callable[[], None]
) -> None:
    """Forward and backward of all that trains; gradients go as they come. `on_turn` ends a turn."""

    def drop(parameter: Tensor) -> None:
        on_gradient(parameter)
        parameter.grad = None

    trained = [p for engine in stage.engines().values() for p in engine.trainable_parameters.values()]
    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    losses, kept = draw(stage, batch)
    losses.total.backward()
    for name, companion in stage.companions.items():
        if companion.turn is not None:
            companion.turn(kept[name]).total.backward()
            on_turn()
    for hook in hooks:
        hook.remove()


def _leave_out(live: LiveBytes, parameter: Tensor) -> None:
    if parameter.grad is not None:
        live.leave_out(parameter.grad)


def _roles(config: DistillConfig, stage: Stage, teacher: nn.Module) -> Iterator[RoleMemory]:
    """Every network that a worker holds, the largest first to claim what is shared."""
    seen: set[int] = set()
    engine, workers = config.engine, config.scale.num_workers
    student = _trained("student", stage.student, engine, workers, seen)
    target, kept = (
        _bytes(slow.weights.values(), seen, 4) if slow is not None else 0
        for slow in (stage.target, stage.average)
    )
    if engine.backend == "deepspeed" and engine.zero_stage == 3:
        kept //= workers
    yield replace(student, averages=target + kept)
    if stage.target is not None and stage.target.net is not None:
        yield _frozen("target", stage.target.net, seen)
    role = _frozen("teacher", teacher, seen)
    yield _divided(role, config, stage, teacher) if engine.shard_teacher else role
    for name, companion in stage.companions.items():
        if companion.engine is not None:
            title = name.replace("_", " ")
            made = _trained(title, companion.engine.module, engine.of(name), workers, seen)
            slow = companion.slow.weights.values() if companion.slow is not None else ()
            yield replace(made, averages=_bytes(slow, seen, 4))
        for title, net in companion.frozen.items():
            yield _frozen(title, net, seen)


def _bytes(tensors: Any, seen: set[int], size: int | None = None) -> int:
    """Bytes of the tensors that no role has yet, at `size` bytes a number or their own."""
    total = 0
    for x in tensors:
        storage = x.untyped_storage()._cdata  # two tensors may be one memory
        if storage not in seen:
            seen.add(storage)
            total += x.numel() * (size or x.element_size())
    return total


def _frozen(name: str, net: nn.Module, seen: set[int]) -> RoleMemory:
    count = sum(p.numel() for p in net.parameters())
    weights = _bytes((*net.parameters(), *net.buffers()), seen)
    return RoleMemory(name, count, 0, weights=weights)


def _divided(role: RoleMemory, config: DistillConfig, stage: Stage, net: nn.Module) -> RoleMemory:
    """What a worker holds of a frozen network in shards, and at most gathers of it: see `frozen`.

    A layer is there twice while it is put together. Where gradients pass, a block's layers stay for its own
    backward pass; without checkpoints all that were multiplied with stay until theirs.
    """
    size = next(net.parameters()).element_size()
    count = lambda module, deep: size * sum(p.numel() for p in module.parameters(recurse=deep))  # noqa: E731
    layer = max(count(module, False) for module in net.modules())
    kept = layer
    if "critic" in stage.companions:
        blocks = (b for blocks in net.modules() if isinstance(blocks, nn.ModuleList) for b in blocks)
        checkpointed = config.engine.activation_checkpointing
        kept = max(count(block, True) for block in blocks) if checkpointed else count(net, True)
    whole = count(net, True)
    workers = config.scale.num_workers
    if not config.engine.offload_teacher:
        return replace(role, weights=role.weights - whole + whole // workers, gathered=layer + kept)
    shares = [size * -(-p.numel() // workers) for p in net.parameters()]
    if config.scale.use_gpu:  # pinned, for which torch rounds each up to a power of two
        shares = [1 << (share - 1).bit_length() for share in shares]
    return replace(role, weights=role.weights - whole, gathered=layer + kept, host=sum(shares))


def _trained(name: str, net: nn.Module, how: EngineConfig, workers: int, seen: set[int]) -> RoleMemory:
    """What an engine holds of a network."""
    engine = holding(net, how, workers)
    weights = _bytes(net.parameters(), seen, 2 if how.precision == "bf16" else 4)
    if how.backend == "deepspeed" and how.zero_stage == 3:
        weights //= workers
    return RoleMemory(
        name,
        sum(p.numel() for p in net.parameters()),
        sum(p.numel() for p in net.parameters() if p.requires_grad),
        weights + _bytes(net.buffers(), seen),
        engine.gradients,
        engine.optimizer,
        gathered=engine.gathered,
        update=engine.update,
        host=engine.host,
    )
