"""Stages with the frozen teacher whole and sharded: what the tests of sharding compare."""

import gc
from dataclasses import replace
from unittest.mock import patch

import torch
from pipeline_cases import live

from raydistill.config.distill import DistillConfig, EngineConfig, MixConfig, ScaleConfig
from raydistill.config.grid import GridConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, OptimizerConfig, SemanticConfig
from raydistill.experts import frozen as frozen_module
from raydistill.experts.frozen import Cutter, Shards
from raydistill.experts.loop import distill
from raydistill.experts.plain_engine import rank_and_size
from raydistill.experts.stages import Given, build_stage
from raydistill.models.teacher import load_frozen, load_schedule, load_teacher
from raydistill.types import Batch, Origin

STEPS = 2
SIZES = {
    "num_steps": STEPS,
    "global_batch": 8,
    "micro_batch": 2,
    "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
}
JUDGED = ObjectiveConfig(adversarial=0.5, feature_matching=1.0)
SMALL_TOO = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed leaves a student's parameters below a hundred thousand whole: here that would be all."""
DRAWN = {"guidance_range": (1.0, 4.0)}
CASES = {
    "semantic": ("semantic", EngineConfig(), {}),
    "semantic, ZeRO 3, scales drawn": ("semantic", EngineConfig(zero_stage=3, extra=SMALL_TOO), DRAWN),
    "semantic, bf16": ("semantic", EngineConfig(precision="bf16"), {}),
    "semantic LoRA, ZeRO 3": ("semantic", EngineConfig(zero_stage=3, extra=SMALL_TOO), {"lora": 2}),
    "semantic, in host memory": ("semantic", EngineConfig(), {"offload": True}),
    "detail": ("detail", EngineConfig(), {}),
    "detail, in host memory": ("detail", EngineConfig(), {"offload": True}),
    "detail, checkpointing": ("detail", EngineConfig(activation_checkpointing=True), {}),
    "recorded": ("semantic", EngineConfig(), {"recorded": True}),
}


def config_of(folder, name, engine, lora=0, recorded=False, offload=False, **more):
    """A short run on two workers, two micro-batches a step."""
    if recorded:
        more |= {"experts": "single", "mix": MixConfig(real_share=0.5, recorded_share=0.5, trajectories="x")}
    return DistillConfig(
        teacher=str(folder),
        boundary=0.5,
        grid=GridConfig(num_intervals=10),
        semantic=SemanticConfig(**SIZES, lora_rank=lora),
        detail=DetailConfig(**SIZES, lora_rank=2, objective=JUDGED),
        engine=replace(engine, offload_teacher=offload and engine.shard_teacher),
        scale=ScaleConfig(num_workers=2),
        **more,
    )


def batches(latents, text, recorded):
    """This rank's own; of recorded paths the first rank has nothing else, the second only videos."""
    rank, _ = rank_and_size()
    made = torch.Generator().manual_seed(11 + rank)
    for k in range(2 * STEPS):
        index = torch.arange(2) + 4 * k + 2 * rank
        x, words, below = (torch.randn(2, *shape, generator=made) for shape in (latents, text, latents))
        batch = Batch(index, x, words)
        origin = torch.full((2,), Origin.VIDEO if rank else Origin.RECORDED)
        yield replace(batch, origin=origin, x_r=below) if recorded else batch


def held_by(net):
    """Bytes of a network's parameters that this process holds, shards or whole."""
    gc.collect()
    found = {}
    for p in net.parameters():
        for x in (p.data, getattr(p, "ds_tensor", None)):
            if x is not None and x.numel():
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def outcome(folder, case, shapes, shard):
    """Weights, losses and the teacher's bytes after a short run."""
    name, engine, more = CASES[case]
    torch.manual_seed(0)
    config = config_of(folder, name, replace(engine, shard_teacher=shard), **more)
    teacher, frozen = load_teacher(folder), []
    whole = sum(p.numel() for p in teacher.parameters())
    semantic = load_teacher(folder) if name == "detail" else None
    latents, text = shapes

    def load(**how):
        frozen.append(load_frozen(folder, **how))
        return frozen[0]

    given = Given(teacher, torch.zeros(1, *latents), torch.zeros(1, *text), semantic, load_schedule(folder))
    # In shards the teacher is read one tensor at a time.
    given = replace(given, load=load if shard else None)
    with patch.object(frozen_module, "frozen_config", wraps=frozen_module.frozen_config) as asked:
        stage = build_stage(config, name, given)
    teacher = frozen[0] if shard else teacher
    losses, held = [], [held_by(teacher)]

    def report(step, figures):
        losses.append({k: v for k, v in figures.items() if k.startswith("loss") or k == "grad_norm"})
        held.append(held_by(teacher))

    data = batches(latents, text, more.get("recorded", False))
    distill(stage, data, report_every=1, save_every=99, report=report, save=lambda _: None)
    weights = {n: w.numpy() for role in stage.engines().values() for n, w in role.weights().items()}
    dtype = next(teacher.parameters()).dtype
    stage.close()
    return {
        "offload": {call.args[2] for call in asked.call_args_list},
        "weights": weights,
        "losses": losses,
        "held": held,
        "whole": whole * dtype.itemsize,
    }


def both_ways(folder, shapes, cases=tuple(CASES)):
    """Every case with the teacher whole, then sharded; on each rank."""
    return {(case, shard): outcome(folder, case, shapes, shard) for case in cases for shard in (False, True)}


def seen(net, inputs):
    """Velocity; of transformers also features and their gradient with respect to the input."""
    x, t, text = inputs
    with torch.no_grad():
        found = [net(x, t, text)]
    if hasattr(net, "features"):
        leaf = x.clone().requires_grad_()
        maps, projected = net.features(leaf, t, text, range(net.num_blocks))
        total = sum(one.square().mean() for one in (*maps, *projected))
        found += [*maps, *projected, *torch.autograd.grad(total, leaf)]
    return found


def passes(folders, inputs):
    """What a network gives in shards against whole, by kind: outputs, input's gradient, share of bytes."""
    found = {}
    for kind, folder in folders.items():
        net = load_teacher(folder).requires_grad_(False)
        if hasattr(net, "features"):
            net.enable_checkpointing()
        whole, size = seen(net, inputs[kind]), held_by(net)
        shards = Shards(net)
        for _ in range(3):  # DeepSpeed records the order of layers, and goes by it afterwards
            apart = seen(net, inputs[kind])
            shards.release()
        outputs = slice(None, -1 if len(whole) > 1 else None)
        equal = all(torch.equal(a, b) for a, b in zip(whole[outputs], apart[outputs], strict=True))
        off = float((apart[-1] - whole[-1]).norm() / whole[-1].norm())
        found[kind] = (equal, off, len(apart), held_by(net) / size)
        shards.close()
    return found


def most_while_loading(folder, dtype):
    """Bytes that came with loading a teacher into shards: the most at once, and what stays."""
    cpu = torch.device("cpu")
    cut, seen = Cutter(frozen_module.frozen_config(dtype, cpu, False), cpu), []
    gc.collect()
    gc.freeze()  # what is there already is many objects, and none of them counts

    def take(parameter):
        seen.append(live())
        cut(parameter)
        seen.append(live())

    net = load_frozen(folder, dtype=dtype, device=torch.device("cpu"), take=take)
    gc.collect()
    assert len(seen) == 2 * len(list(net.parameters()))
    return max(seen), live()
