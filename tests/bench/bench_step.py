"""What Ray and DeepSpeed cost per step: the semantic stage over a bare torch loop of the same maths.

    python tests/bench/bench_step.py [steps]

Ratios of one run on one machine; both sides use one thread per process. Read them on an idle machine.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "jobs")]

import distill  # noqa: E402
import ray  # noqa: E402

from raydistill.artifacts import LatentStore  # noqa: E402
from raydistill.config.distill import DistillConfig, ScaleConfig, TrackingConfig  # noqa: E402
from raydistill.config.stages import SemanticConfig  # noqa: E402
from raydistill.consistency.average import moving_average_  # noqa: E402
from raydistill.experts.launch import cluster  # noqa: E402
from raydistill.experts.progress import read_metrics  # noqa: E402
from raydistill.experts.semantic import consistency_losses  # noqa: E402
from raydistill.experts.stages import Given, build_stage  # noqa: E402
from raydistill.latents.shards import latent_row, write_shard  # noqa: E402
from raydistill.models.teacher import load_teacher  # noqa: E402
from raydistill.models.wan import build_tiny_teacher  # noqa: E402
from raydistill.shards import write_artifact  # noqa: E402
from raydistill.types import Batch  # noqa: E402

# As a script the job's own functions travel by value; as a module they would be looked for by the workers.
ray.cloudpickle.register_pickle_by_value(distill)
LATENTS, TEXT, ROWS = (4, 16, 4, 4), (8, 32), 64


def write_inputs(folder: Path) -> None:
    """Write an untrained teacher, and latents of noise."""
    build_tiny_teacher(0).transformer.save_pretrained(folder / "teacher")
    draw = np.random.default_rng(0)
    rows = [
        latent_row(
            draw.standard_normal(LATENTS, np.float32),
            draw.standard_normal(TEXT, np.float32),
            f"row {i}",
            str(i),
        )
        for i in range(ROWS)
    ]
    shard = write_shard(folder / "latents", "part-0", rows, {"bench": 1}, order=0, rows_per_group=1)
    write_artifact(folder / "latents", [shard], {"bench": 1})


def bare(config: DistillConfig, steps: int) -> float:
    """Seconds per step of the loop that one would write by hand: no Ray, no engine, no checks."""
    config = replace(config, scale=ScaleConfig(num_workers=1), engine=replace(config.engine, backend="torch"))
    teacher, store = load_teacher(config.teacher), LatentStore(config.data)
    size = config.semantic.global_batch
    latents = torch.stack([torch.from_numpy(store.row(i).latents) for i in range(size)])
    text = torch.stack([torch.from_numpy(store.row(i).text) for i in range(size)])
    stage = build_stage(config, "semantic", Given(teacher, latents[:1], text[:1]))
    weights = list(stage.student.parameters())
    copies = [list(slow.weights.values()) for slow in (stage.target, stage.average) if slow is not None]
    optimizer = torch.optim.AdamW(weights, lr=config.semantic.optimizer.learning_rate, weight_decay=0.0)
    marks = []
    for step in range(steps):
        marks.append(time.perf_counter())
        batch = Batch(torch.arange(step * size, (step + 1) * size), latents, text)
        consistency_losses(stage.nets, stage.segment, batch, config.semantic.objective)[0].total.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.semantic.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        for copy in copies:
            moving_average_([p.data for p in copy], [p.detach() for p in weights], 0.99)
    return statistics.median(np.diff(marks)[2:])


def whole(config: DistillConfig, workers: int) -> float:
    """Seconds per step of the product, once it runs."""
    size = config.semantic.global_batch // workers
    output = Path(config.output) / f"workers-{workers}"
    config = replace(
        config,
        output=str(output),
        scale=ScaleConfig(num_workers=workers, cpus_per_worker=0.5),
        semantic=replace(config.semantic, micro_batch=size),
    )
    distill.run_stage(config, "semantic", LatentStore(config.data), None, {})
    rates = [record["steps_per_s"] for record in read_metrics(output)]
    return 1 / statistics.median(rates[1:])


def main() -> None:
    """Print seconds per step and ratios."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_inputs(folder)
        config = DistillConfig(
            teacher=str(folder / "teacher"),
            data=str(folder / "latents"),
            output=str(folder / "out"),
            semantic=SemanticConfig(num_steps=steps, micro_batch=32, global_batch=32),
            scale=ScaleConfig(num_workers=1),
            tracking=TrackingConfig(tensorboard=False),
            report_every=5,
            save_every=steps,
        )
        before = bare(config, steps)
        with cluster(ScaleConfig(num_workers=2)):
            one, two = whole(config, 1), whole(config, 2)
        alone = min(before, bare(config, steps))
    print(f"bare torch loop, 1 process   {alone * 1e3:7.1f} ms/step   1.00")
    print(f"Ray + DeepSpeed, 1 worker    {one * 1e3:7.1f} ms/step   {one / alone:.2f}")
    print(f"Ray + DeepSpeed, 2 workers   {two * 1e3:7.1f} ms/step   {two / alone:.2f}")


if __name__ == "__main__":
    main()
