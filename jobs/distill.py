"""Distil a many-step teacher into a few-step student.

    python jobs/distill.py --config jobs/tiny/distill.yaml [key=value ...]
    python jobs/distill.py --config jobs/tiny/distill.yaml --analyse

Run the same command again and it goes on where it stopped.
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from raydistill.artifacts import LatentStore, tree_digest
from raydistill.config.distill import DistillConfig, StageConfig
from raydistill.config.load import dump, from_command_line, run
from raydistill.errors import DistillError, InvalidValue, MissingArtifact, disk_full_explained
from raydistill.evaluation.analysis_plots import draw_analysis
from raydistill.experts import checkpoint
from raydistill.experts.analyse import analyse
from raydistill.experts.launch import Feed, Worker, cluster, launch
from raydistill.experts.stages import build_segment
from raydistill.experts.tracking import require_installed
from raydistill.experts.worker import SETTINGS, Run, load_result, settings_of, train
from raydistill.models.wan import load_teacher, require_fit
from raydistill.sampler import SamplingPlan, build_plan, plan_times, with_tail
from raydistill.student import Card, save_student
from raydistill.trajectories.flow import feed, iter_batches
from raydistill.trajectories.plan import Plan, Source

SWITCHES = {
    "analyse": "draw loss, gradient and x0 change by noise level for this teacher, and propose a boundary"
}


def build_data_plan(config: DistillConfig, store: LatentStore, global_batch: int) -> Plan:
    """One source: every row once per epoch, in an order keyed by the seed."""
    source = Source(name="video", num_rows=len(store), weight=1.0, digest=store.fingerprint)
    return Plan(seed=config.seed, global_batch=global_batch, sources=(source,))


def batches_of(plan: Plan, worker: Worker, micro_batch: int):
    """This worker's micro-batches, checked against the plan."""
    replaced = worker.run_dir / "quarantine.jsonl"
    ranks = (worker.rank, worker.world_size)
    return iter_batches(worker.shard, plan, *ranks, micro_batch, worker.start_step, quarantine=replaced)


def run_stage(
    config: DistillConfig, name: str, store: LatentStore, semantic: Path | None, digests: dict
) -> Path:
    """Run one stage on Ray and return its last checkpoint."""
    stage = config.semantic if name == "semantic" else config.detail
    settings = settings_of(config, name, digests, semantic)
    plan = build_data_plan(config, store, stage.global_batch)
    row = store.row(0)
    told = Run(
        config=config,
        batches=partial(batches_of, plan),
        example=(torch.from_numpy(row.latents.copy())[None], torch.from_numpy(row.text.copy())[None]),
        semantic=semantic,
    )

    def feed_from(start_step: int):
        return feed(
            plan,
            {"video": config.data},
            start_step=start_step,
            num_steps=stage.num_steps,
            world_size=config.scale.num_workers,
            micro_batch=stage.micro_batch,
        )

    data: Feed = feed_from
    return launch(
        train,
        config=told,
        scale=config.scale,
        state=checkpoint.TrainState(stage=name, step=0, settings=settings, plan=plan.state(0)),
        num_steps=stage.num_steps,
        run_dir=config.output,
        feed=data,
        resume=config.resume,
    )


def plans_of(config: DistillConfig) -> dict[str, SamplingPlan]:
    """The sampling plans that are stored with the student, by name."""
    segment, sampling = build_segment(config, "semantic"), config.sampling
    grid, path = segment.grid, sampling.path
    boundary = None if config.experts == "single" else segment.lower
    plans = {str(n): build_plan(n, boundary, grid, path) for n in sampling.num_steps}
    if boundary is not None:
        plans |= {f"{n}+tail": with_tail(n, boundary, grid, path) for n in sampling.semantic_tail}
    own = {name: plan_times(tuple(t), boundary, grid.last, path) for name, t in sampling.times.items()}
    return plans | own


def export(
    config: DistillConfig, store: LatentStore, digests: dict, semantic: Path, detail: Path | None
) -> Path:
    """Write the student folder from the stages' last checkpoints."""
    teacher = load_teacher(config.teacher)
    first = load_result(config, semantic, teacher)
    second = load_result(config, detail, teacher, first) if detail else None
    row = store.row(0)
    card = Card(
        kind=config.experts,
        boundary=None if config.experts == "single" else build_segment(config, "semantic").lower,
        grid=build_segment(config, "semantic").grid,
        guidance_scale=config.guidance_scale,
        latent_shape=row.latents.shape,
        text_shape=row.text.shape,
        lora=(config.detail.lora_rank, config.detail.lora_alpha) if config.experts == "dual" else None,
        sources={**digests, "seed": config.seed},
    )
    folder = Path(config.output) / "student"
    save_student(folder, card, first, second, plans_of(config))
    return folder


def check(config: DistillConfig, store: LatentStore, *, analyse: bool = False) -> dict[str, str]:
    """Find whatever would stop the run later, before anything is started; return the inputs' digests.

    The analysis needs neither boundary nor plans: it proposes the first.
    """
    require_installed(config.tracking)
    if not (Path(config.codec) / "config.json").is_file():
        raise MissingArtifact(f"no codec at {config.codec}: codec= names the folder that made {config.data}")
    codec = tree_digest(config.codec)
    store.require_codec(codec)
    row = store.row(0)
    require_fit(config.teacher, row.latents.shape, row.text.shape)
    if not analyse:
        for stage in ("semantic",) if config.experts == "single" else ("semantic", "detail"):
            build_segment(config, stage)
            require_frames(config, stage, row.latents.shape[1])
        plans_of(config)
    return {"teacher": tree_digest(config.teacher), "codec": codec, "latents": store.fingerprint}


def require_frames(config: DistillConfig, name: str, frames: int) -> None:
    """Temporal coherence compares latent frames so far apart; there must be two such."""
    stage: StageConfig = getattr(config, name)
    objective, key = stage.objective, f"{name}.objective.coherence_stride"
    if objective.temporal_coherence and frames <= objective.coherence_stride:
        raise InvalidValue(key, objective.coherence_stride, f"below the {frames} frames of these latents")


def analyse_teacher(config: DistillConfig, store: LatentStore) -> None:
    """Draw `analysis.png` and print the boundary that it proposes."""

    def read(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = store.row(i)
        return torch.from_numpy(row.latents.copy()), torch.from_numpy(row.text.copy())

    result = analyse(config, read, len(store), report=print)
    picture = Path(config.output) / "analysis.png"
    draw_analysis(result, picture)
    print(f"{picture}: proposed boundary={result['boundary']:.4g}, in use {config.boundary:.4g}")


def main() -> None:
    """Check everything, then train both stages and export the student."""
    config, switches = from_command_line(DistillConfig, sys.argv[1:], switches=SWITCHES)
    store = LatentStore(config.data)
    output, only_analyse = Path(config.output), "analyse" in switches
    digests = check(config, store, analyse=only_analyse)
    output.mkdir(parents=True, exist_ok=True)
    if only_analyse:
        with disk_full_explained(output, DistillError):
            analyse_teacher(config, store)
            dump(config, output / "analysis.yaml")
        return
    with disk_full_explained(output, DistillError), checkpoint.alone_in(output):
        distil(config, store, digests)


def finished(config: DistillConfig) -> bool:
    """Whether every stage seems to have its last checkpoint, so that one Ray for both need not be started.

    Goes by sizes alone; `launch` reads every byte, and starts a Ray of its own should one be wrong.
    """
    stages = {"semantic": config.semantic} | ({} if config.experts == "single" else {"detail": config.detail})
    newest = {n: checkpoint.newest_verified(Path(config.output), n, contents=False) for n in stages}
    return all(checkpoint.step_of(path) >= stages[name].num_steps for name, path in newest.items())


def distil(config: DistillConfig, store: LatentStore, digests: dict[str, str]) -> None:
    """Train the stages on Ray, export the student."""
    output = Path(config.output)
    with nullcontext() if finished(config) else cluster(config.scale):
        semantic = run_stage(config, "semantic", store, None, digests)
        detail = None if config.experts == "single" else run_stage(config, "detail", store, semantic, digests)
    dump(config, output / SETTINGS)  # also where nothing was left to train, and other plans are asked for
    damaged = [path for path in output.glob("quarantine-*.jsonl") if path.stat().st_size]
    if damaged:
        print(f"damaged rows were replaced by others: {', '.join(map(str, damaged))}")
    print(f"student: {export(config, store, digests, semantic, detail)}")


if __name__ == "__main__":
    run(main)
