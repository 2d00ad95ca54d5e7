"""A plan in words: tables for people, and what to change where it does not fit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from raydistill.config.distill import DistillConfig
from raydistill.errors import DoesNotFit, InvalidValue
from raydistill.experts.planner import GIB, StagePlan, plan_stage


def plan_lines(config: DistillConfig, plan: StagePlan) -> Iterator[str]:
    """A stage's plan as lines of text."""
    ask = config.plan
    yield f"{plan.name}, each of {plan.workers} workers, GiB:"
    head = (
        "role",
        "params M",
        "trained M",
        "weights",
        "gathered",
        "gradients",
        "optimizer",
        "averages",
        "total",
    )
    wide = 11 * (len(head) - 1)
    yield "  " + "".join(f"{title:>15}" if i == 0 else f"{title:>11}" for i, title in enumerate(head))
    for role in plan.roles:
        bytes_ = (role.weights, role.gathered, role.gradients, role.optimizer, role.averages, role.device)
        numbers = [role.parameters / 1e6, role.trained / 1e6, *(b / GIB for b in bytes_)]
        yield f"  {role.name:>15}" + "".join(f"{value:>11,.2f}" for value in numbers)
    clip = f"{plan.tokens:,} tokens a clip" if plan.tokens else "a U-Net"
    size = config.stage(plan.name).micro_batch
    yield f"  {'activations':>15}{plan.activations / GIB:>{wide}.2f}   ({clip}, {size} at once)"
    yield from _update_line(plan, wide)
    if plan.device == plan.loading:
        why = "the student, whole in float32 on every worker, and its target"
        yield f"  {'loading':>15}{plan.loading / GIB:>{wide}.2f}   ({why})"
    yield f"  {'all':>15}{plan.device / GIB:>{wide}.2f}   of {usable(config) / GIB:.1f} usable"
    if plan.host:
        yield f"  {'in host memory':>15}{plan.host / GIB:>{wide}.2f}"
    passes = ", ".join(f"{count:g} {role}" for role, count in plan.passes.items())
    yield f"  passes a sample: {passes}; {plan.flops / 1e12:,.1f} TFLOP with backward"
    hours = plan.hours(ask.tflops)
    steps = config.stage(plan.name).num_steps
    seconds = hours * 3600 / plan.workers / steps
    yield (
        f"  {steps} steps: {seconds:,.1f} s each at {ask.tflops:g} TFLOP/s a device, "
        f"{hours:,.1f} device-hours, {hours * ask.price_per_hour:,.0f} at {ask.price_per_hour:g} an hour"
    )


def _update_line(plan: StagePlan, wide: int) -> Iterator[str]:
    more, name = plan.update
    if more > 0:
        when = "when activations are gone" if name == "student" else "beside what it was given to look at"
        yield f"  {'update':>15}{more / GIB:>{wide}.2f}   (the {name}'s, {when})"


def usable(config: DistillConfig) -> float:
    """Bytes of a device that a plan may fill."""
    return config.plan.memory_gib * GIB * (1 - config.plan.reserve)


Change = tuple[str, Callable[[], DistillConfig]]


def changes(config: DistillConfig, name: str) -> Iterator[Change]:
    """Settings that take less memory, each by itself, the cheapest in time first; some may be refused."""
    stage, engine = config.stage(name), config.engine
    for values in engine_changes(config):
        other = partial(replace, engine, **values)
        said = " ".join(f"engine.{key}={value}" for key, value in values.items())
        yield said, lambda other=other: replace(config, engine=other())
    if stage.micro_batch > 1:
        yield f"{name}.micro_batch=1", lambda: replace(config, **{name: replace(stage, micro_batch=1)})
    if name == "semantic" and not config.semantic.lora_rank:
        lora = replace(config.semantic, lora_rank=64)
        yield "semantic.lora_rank=64", lambda: replace(config, semantic=lora)
    if engine.zero_stage or engine.shard_teacher:
        scale = replace(config.scale, num_workers=2 * config.scale.num_workers)
        yield f"scale.num_workers={scale.num_workers}", lambda: replace(config, scale=scale)


def engine_changes(config: DistillConfig) -> Iterator[dict[str, Any]]:
    """Fields of the engine that take less memory with other values."""
    engine = config.engine
    sharded = engine.backend == "deepspeed" and engine.zero_stage > 0
    if not engine.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if engine.precision == "fp32" and sharded:
        yield {"precision": "bf16"}
    if sharded and engine.zero_stage < 3 and config.scale.num_workers > 1:
        yield {"zero_stage": 3}
    if engine.backend == "deepspeed" and not engine.shard_teacher and config.scale.num_workers > 1:
        yield {"shard_teacher": True}
    if sharded and not engine.offload_optimizer:
        yield {"offload_optimizer": True}
    if engine.backend == "deepspeed" and not engine.offload_teacher:
        yield {"shard_teacher": True, "offload_teacher": True}


def require_it_fits(
    config: DistillConfig, plan: StagePlan, latents: Sequence[int], text: Sequence[int]
) -> None:
    """Raise DoesNotFit, naming what each change alone would bring, unless the plan fits into a device."""
    room = usable(config)
    if plan.device <= room:
        return
    found = list[tuple[str, int]]()
    for change, make in changes(config, plan.name):
        with suppress(InvalidValue):  # batches that do not divide, networks that cannot be checkpointed
            found.append((change, plan_stage(make(), plan.name, latents, text).device))
    found = [(change, size) for change, size in found if size < plan.device]  # averages grow at ZeRO 3
    said = [f"{change}: {size / GIB:.1f}{' fits' if size <= room else ''}" for change, size in found]
    raise DoesNotFit(plan.name, plan.device / GIB, room / GIB, tuple(said))
