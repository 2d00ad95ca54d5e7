"""A training function for Ray Train as small as can be, and ways for it to fail."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray.data
import torch
import torch.distributed as dist
from engine_cases import build, weights
from safetensors.numpy import save_file

from raydistill.errors import NonFiniteLoss, PlanMismatch
from raydistill.experts import checkpoint
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.launch import Worker

NUM_STEPS, BATCH, SAVE_EVERY = 12, 8, 3
SETTINGS = {"zero_stage": 2}
STATE = TrainState(stage="semantic", step=0, settings=SETTINGS)


def feed(start_step: int):
    """Global sample indices from `start_step` on, one block per (step, rank)."""
    first, steps = start_step * BATCH, NUM_STEPS - start_step
    rows = ray.data.range(steps * BATCH, override_num_blocks=steps * 2)
    return rows.map_batches(lambda rows: {"index": rows["id"] + first}, batch_size=None)


def feed_with_a_bug(start_step: int):
    """A loader that raises."""

    def load(rows):
        raise RuntimeError("shapes do not fit")

    return ray.data.range(NUM_STEPS * BATCH, override_num_blocks=NUM_STEPS).map_batches(load, batch_size=None)


def sample(index: np.ndarray) -> torch.Tensor:
    """A function of the global index alone."""
    return torch.tensor(np.sin(np.outer(index + 1.0, np.arange(1, 7))), dtype=torch.float32)


def expected_indices(step: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous part of a step's samples."""
    return np.arange(step * BATCH, (step + 1) * BATCH).reshape(world_size, -1)[rank]


def one_step(engine, index: np.ndarray) -> float:
    """Forward, backward, update."""
    loss = (engine.module(sample(index)) - 1.0).square().mean()
    engine.backward(loss)
    assert engine.step()
    return loss.item()


def unbroken(folder: Path) -> None:
    """The same run without Ray and without accidents; for gloo ranks."""
    engine = build(**SETTINGS)
    for step in range(NUM_STEPS):
        one_step(engine, expected_indices(step, dist.get_rank(), dist.get_world_size()))
    keep_weights(engine, folder / "unbroken.safetensors")


def keep_weights(engine, path: Path) -> None:
    """Every rank calls this; rank 0 writes."""
    final = weights(engine)
    if dist.get_rank() == 0:
        save_file(final, path)


def note_and_raise(worker: Worker) -> None:
    """A bug in the training function that torch reports as a RuntimeError."""
    with (worker.run_dir / "accidents").open("a") as stream:
        stream.write("started\n")
    torch.ones(2) @ torch.ones(3)


def train(worker: Worker) -> None:
    """Resume, train, save; meet the accident that the config asks for."""
    engine = build(**SETTINGS)
    if worker.resume_from:
        checkpoint.load(worker.resume_from, worker.state, parts={"student": engine})
    assert engine.steps == worker.start_step
    blocks = worker.shard.iter_batches(batch_size=BATCH // worker.world_size, batch_format="numpy")
    for step, rows in enumerate(blocks, worker.start_step):
        if not np.array_equal(rows["index"], expected_indices(step, worker.rank, worker.world_size)):
            raise PlanMismatch(f"step {step}, rank {worker.rank}: {rows['index']}")
        accident(worker, step)
        loss = one_step(engine, rows["index"])
        record(worker, engine, loss)
        if engine.steps % SAVE_EVERY == 0:
            state = replace(worker.state, step=engine.steps)
            checkpoint.save(worker.run_dir, state, parts={"student": engine})
    keep_weights(engine, worker.run_dir / "final.safetensors")


def record(worker: Worker, engine, loss: float) -> None:
    """What the progress bar reads."""
    if worker.rank == 0:
        line = {"stage": worker.stage, "step": engine.steps, "loss/consistency": loss, "steps_per_s": 10.0}
        with (worker.run_dir / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def accident(worker: Worker, step: int) -> None:
    """Damage the newest checkpoint and kill this process, once; or raise."""
    wanted = worker.config
    if (step, worker.rank) != (wanted["step"], wanted["rank"]):
        return
    with (worker.run_dir / "accidents").open("a") as stream:
        stream.write(f"{worker.start_step} {step}\n")
    if wanted["kind"] == "nan":
        raise NonFiniteLoss("consistency", step, math.nan)
    if (worker.run_dir / "accidents").read_text().count("\n") == 1:
        flip_a_bit(max(worker.run_dir.glob("checkpoints/*-step-*")))
        os.kill(os.getpid(), signal.SIGKILL)


def flip_a_bit(folder: Path) -> None:
    """In the middle of the last rank's part."""
    part = max(folder.glob("student/part-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
