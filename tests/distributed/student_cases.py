"""Whole runs whose student is read whole, then in shards: what the tests of ZeRO 3 from the start compare."""

import gc
from dataclasses import replace
from pathlib import Path
from unittest.mock import PropertyMock, patch

import torch
from safetensors.torch import load_file
from sharding_cases import SMALL_TOO, held_by

from raydistill.config.distill import DistillConfig, ScaleConfig, TargetConfig
from raydistill.config.engine import EngineConfig, RoleConfig
from raydistill.config.grid import GridConfig
from raydistill.config.stages import (
    DetailConfig,
    MotionConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SemanticConfig,
)
from raydistill.experts import worker
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.engine import whole_shape
from raydistill.experts.launch import Worker
from raydistill.experts.plain_engine import rank_and_size
from raydistill.experts.worker import Run, settings_of
from raydistill.types import Batch

STEPS = 3
SIZES = {
    "num_steps": STEPS,
    "global_batch": 4,
    "micro_batch": 1,
    "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
}
ZERO_3 = EngineConfig(zero_stage=3, extra=SMALL_TOO)
"""The last case has DeepSpeed's own threshold, below which a parameter comes back whole: here all do."""
CASES = {
    "dual, checkpointing": {"engine": replace(ZERO_3, activation_checkpointing=True)},
    "dual on a LoRA, bf16, sharded teacher": {
        "lora_rank": 2,
        "engine": replace(ZERO_3, precision="bf16", shard_teacher=True, critic=RoleConfig(zero_stage=2)),
    },
    "dual_full, optimizer away": {
        "experts": "dual_full",
        "engine": replace(ZERO_3, offload_optimizer=True),
    },
    "motion, the last weights": {
        "experts": "motion",
        "average_decay": 0.0,
        "engine": EngineConfig(zero_stage=3),
    },
}


def config_of(folder, case, output):
    """Settings of a run on two workers."""
    more = dict(CASES[case])
    return DistillConfig(
        teacher=str(folder),
        output=str(output),
        boundary=0.5,
        grid=GridConfig(num_intervals=10),
        target=TargetConfig(kind="online"),
        semantic=SemanticConfig(**SIZES, lora_rank=more.pop("lora_rank", 0)),
        detail=DetailConfig(**SIZES, lora_rank=2, objective=ObjectiveConfig(adversarial=0.5)),
        motion=MotionConfig(**SIZES, lora_rank=2, objective=ObjectiveConfig(motion=0.0)),
        scale=ScaleConfig(num_workers=2),
        save_every=2,
        keep=9,
        **({"average_decay": 0.9, "engine": ZERO_3} | more),
    )


def batches(shapes):
    """Two micro-batches a step, from the worker's own step on."""

    def feed(place, size):
        latents, text = shapes
        for k in range(2 * STEPS):
            made = torch.Generator().manual_seed(100 * k + place.rank)
            x, words = (torch.randn(size, *shape, generator=made) for shape in (latents, text))
            if k >= 2 * place.start_step:
                yield Batch(torch.arange(size) + 2 * k + place.rank, x, words)

    return feed


def place_of(config, name, shapes, semantic=None, resume_from=None, start_step=0):
    """What Ray's launcher would tell this rank."""
    rank, world_size = rank_and_size()
    example = tuple(torch.zeros(1, *shape) for shape in shapes)
    state = TrainState(stage=name, step=0, settings=settings_of(config, name, {}, semantic))
    run = Run(config=config, batches=batches(shapes), example=example, semantic=semantic)
    return Worker(
        config=run,
        state=state,
        run_dir=Path(config.output),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        start_step=start_step,
        resume_from=resume_from,
        shard=None,
    )


def checkpoint_of(config, name, step=STEPS):
    return Path(config.output) / "checkpoints" / f"{name}-step-{step:06d}"


def kept_in(folder):
    """All tensors of a checkpoint: weights, moments, averages."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{name}": x.numpy() for name, x in load_file(file).items()}
    return found


def run_of(folder, case, shapes, output):
    """Checkpoints of all stages; what part of each student a worker has read, and its average's bytes."""
    config, semantic, held = config_of(folder, case, output), None, {}
    Path(output).mkdir(exist_ok=True)
    build, load, read = worker._build, worker.load_frozen, []

    def loaded(*where, **how):
        net = load(*where, **how)
        count = sum(whole_shape(p).numel() for p in net.parameters())
        read.append(held_by(net) / (count * next(net.parameters()).element_size()))
        return net

    def built(run, place):
        read.clear()
        stage = build(run, place)
        gc.collect()
        average = stage.average.weights.values() if stage.average else ()
        held[place.stage] = (
            read[0],
            sum(w.numel() * w.element_size() for w in average),
            sum(shape.numel() for shape in stage.engine.shapes.values()),
            {role: engine._stage for role, engine in stage.engines().items()},
        )
        return stage

    for name in config.stages:
        with patch.object(worker, "_build", built), patch.object(worker, "load_frozen", loaded):
            worker.train(place_of(config, name, shapes, semantic))
        semantic = checkpoint_of(config, name)
    return {name: kept_in(checkpoint_of(config, name)) for name in config.stages}, held


def every_case(folder, shapes, output, apart):
    """Each with its student read whole, or in shards: in other processes, as DeepSpeed changes torch."""
    found = {}
    for case in CASES:
        with patch.object(DistillConfig, "student_in_shards", PropertyMock(return_value=apart)):
            found[case, apart] = run_of(folder, case, shapes, f"{output}/{case}-{apart}")
    return found


def taken_up(folder, shapes, output):
    """The first case's semantic stage, from its checkpoint at step 2 to the end, by a run in shards."""
    case = next(iter(CASES))
    config = config_of(folder, case, f"{output}/{case}-True")
    middle, after = checkpoint_of(config, "semantic", 2), replace(config, output=f"{output}/after")
    Path(after.output).mkdir(exist_ok=True)
    worker.train(place_of(after, "semantic", shapes, resume_from=middle, start_step=2))
    return kept_in(checkpoint_of(after, "semantic")), kept_in(checkpoint_of(config, "semantic"))
