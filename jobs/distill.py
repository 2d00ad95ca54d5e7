"""Distil a many-step teacher into a few-step student.

    python jobs/distill.py --config jobs/tiny/distill.yaml [key=value ...]
    python jobs/distill.py --config jobs/tiny/distill.yaml --analyse
    python jobs/distill.py --config jobs/wan21_1_3b/dcm.yaml --plan

Run the same command again and it goes on where it stopped.
"""

import sys

from raydistill.config.distill import SWITCHES, DistillConfig
from raydistill.config.load import dump, from_command_line, read_early, run

if __name__ == "__main__":
    read_early(DistillConfig, SWITCHES)

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from raydistill.artifacts import LatentRow, LatentStore, tree_digest
from raydistill.config.stages import StageConfig
from raydistill.errors import DistillError, InvalidValue, MissingArtifact, StaleArtifact, disk_full_explained
from raydistill.evaluation.analysis_plots import draw_analysis
from raydistill.experts import checkpoint
from raydistill.experts.advice import plan_lines, require_it_fits
from raydistill.experts.analyse import analyse
from raydistill.experts.launch import Feed, Worker, cluster, launch
from raydistill.experts.planner import StagePlan, plan_stage
from raydistill.experts.result import Sample, plans_of, write_student
from raydistill.experts.stages import build_segment, require_own_networks
from raydistill.experts.tracking import require_installed
from raydistill.experts.worker import SETTINGS, Run, settings_of, train
from raydistill.models.codec_config import read_codec
from raydistill.models.folders import boundary_ratio, codec_digest, part_folder, teacher_digest
from raydistill.models.frame_critic import pool_text
from raydistill.models.frame_features import load_frame_features
from raydistill.models.teacher import read_schedule, require_fit
from raydistill.models.text import null_of
from raydistill.trajectories.flow import feed, iter_batches
from raydistill.trajectories.inputs import Stores, named
from raydistill.trajectories.lanes import Intervals, Lanes, Rows, build_lanes
from raydistill.trajectories.record.recorder import asked_of_paths
from raydistill.trajectories.store import TrajectoryStore

CAPTIONS_READ = 512


def build_data_plan(config: DistillConfig, stage: StageConfig, stores: Stores) -> Lanes:
    """Every row of a lane once per epoch, in an order keyed by the seed; the lanes in exact shares."""
    rows = lambda store, most=0: Rows(min(len(store), most or len(store)), store.fingerprint)  # noqa: E731
    judged = stage.objective.appearance > 0 and stores.images is not None
    return build_lanes(
        config.seed,
        stage.global_batch,
        rows(stores.video),
        real_share=config.mix.real_share,
        recorded_share=config.mix.recorded_share,
        per=config.mix.per,
        recorded=rows(stores.recorded) if stores.recorded else None,
        images=rows(stores.images, config.max_images) if judged else None,
        images_per_step=stage.appearance.images_per_step,
    )


def batches_of(plan: Lanes, worker: Worker, micro_batch: int):
    """This worker's micro-batches, checked against the plan."""
    replaced = worker.run_dir / "quarantine.jsonl"
    ranks = (worker.rank, worker.world_size)
    return iter_batches(worker.shard, plan, *ranks, micro_batch, worker.start_step, quarantine=replaced)


def intervals_of(config: DistillConfig, name: str) -> Intervals:
    """Which interval of the grid each sample is drawn from, as `Segment.times` draws it."""
    segment = build_segment(config, name)
    inside = segment.grid.intervals_in(segment.upper, segment.lower)
    return Intervals(segment.seed, inside.start, len(inside))


def mean_captions(config: DistillConfig, stores: Stores) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean pooled caption of clips and of images, over at most CAPTIONS_READ rows of each."""
    if stores.images is None:
        return None
    most = config.max_images or len(stores.images)
    return _mean_caption(stores.video, len(stores.video)), _mean_caption(stores.images, most)


def _mean_caption(store: LatentStore, count: int) -> torch.Tensor:
    most = min(count, len(store))
    read = min(most, CAPTIONS_READ)
    rows = store.rows([k * most // read for k in range(read)])
    return pool_text(torch.stack([torch.from_numpy(row.text.copy()) for row in rows])).mean(dim=0)


def run_stage(config: DistillConfig, name: str, stores: Stores, semantic: Path | None, digests: dict) -> Path:
    """Run one stage on Ray and return its last checkpoint."""
    stage = config.stage(name)
    settings = settings_of(config, name, digests, semantic)
    plan = build_data_plan(config, stage, stores)
    row = stores.video.row(0)
    told = Run(
        config=config,
        batches=partial(batches_of, plan),
        example=(torch.from_numpy(row.latents.copy())[None], torch.from_numpy(row.text.copy())[None]),
        semantic=semantic,
        caption_means=mean_captions(config, stores),
        null_text=null_of(stores.video),
    )

    def feed_from(start_step: int):
        return feed(
            plan,
            stores.folders,
            start_step=start_step,
            num_steps=stage.num_steps,
            world_size=config.scale.num_workers,
            micro_batch=stage.micro_batch,
            interval_of=intervals_of(config, name),
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


def check(config: DistillConfig, stores: Stores, *, analyse: bool = False) -> dict[str, str]:
    """Find whatever would stop the run later, before anything is started; return the inputs' digests.

    The analysis needs neither boundary nor plans: it proposes the first.
    """
    require_installed(config.tracking)
    try:
        read_codec(part_folder(config.codec, "vae"))
    except MissingArtifact as missing:
        missing.add_note(f"codec= names the folder that made {config.data}")
        raise
    codec = codec_digest(config.codec)
    with named("data", f"made with another encode.codec than codec={config.codec}"):
        stores.video.require_codec(codec)
    row = stores.video.row(0)
    require_fit(config.teacher, row.latents.shape, row.text.shape)
    read_schedule(config.teacher)
    require_own_networks(config)
    null_of(stores.video)
    digests = {"teacher": teacher_digest(config.teacher), "codec": codec, **stores.digests}
    if analyse:
        if (ratio := boundary_ratio(config.teacher)) is not None:
            raise InvalidValue("teacher", config.teacher, f"one network: its two meet at {ratio} already")
        return digests
    for name in config.stages:
        build_segment(config, name)
        require_frames(config, name, row.latents.shape[1])
        build_data_plan(config, config.stage(name), stores)
    plans_of(config)
    if stores.images is not None:
        digests |= require_images(config, stores.images, codec, row)
    if stores.recorded is not None:
        require_recorded(config, stores.recorded, stores.video)
    return digests


def require_images(config: DistillConfig, images: LatentStore, codec: str, clip: LatentRow) -> dict[str, str]:
    """Images must be of the clips' codec, sizes and kind of caption; returns the feature nets' digests."""
    with named("images", f"made with another encode.codec than codec={config.codec}"):
        images.require_codec(codec)
    if config.max_images > len(images):
        raise InvalidValue("max_images", config.max_images, f"at most the {len(images)} of {config.images}")
    row = images.row(0)
    if row.latents.shape[1] != 1:
        raise StaleArtifact(
            f"{config.images} holds clips of {row.latents.shape[1]} latent frames, not images"
        )
    shapes = [(one.latents.shape[0], one.latents.shape[2:], one.text.shape) for one in (row, clip)]
    if shapes[0] != shapes[1]:
        raise StaleArtifact(
            f"{config.images} and {config.data} differ in channels, size or text: {shapes[0]}, {shapes[1]}: "
            "prepare both with the same height, width and encode settings"
        )
    digests = {}
    for name in config.stages:
        stage = config.stage(name)
        if stage.objective.appearance:
            load_frame_features(stage.appearance.features)
            digests[f"{name}_features"] = tree_digest(stage.appearance.features)
    return digests


def require_recorded(config: DistillConfig, recorded: TrajectoryStore, clips: LatentStore) -> None:
    """Recorded paths must be of this run's teacher, guidance and grid."""
    scale = config.guidance_scale
    low, high = config.guidance_range or (scale, scale)
    recorded.require_run(asked_of_paths(config.teacher, (low, high), config.grid))
    recorded.require_run({"models": clips.manifest.identity.get("models", {})})
    row, path = clips.row(0), recorded.row(0)
    if (row.latents.shape, row.text.shape) != (path.latents.shape, path.text.shape):
        raise StaleArtifact(f"{recorded.folder} holds paths of other sizes than {clips.folder}: record again")


def require_frames(config: DistillConfig, name: str, frames: int) -> None:
    """Temporal coherence compares latent frames so far apart; there must be two such."""
    objective, key = config.stage(name).objective, f"{name}.objective.coherence_stride"
    if objective.temporal_coherence and frames <= objective.coherence_stride:
        raise InvalidValue(key, objective.coherence_stride, f"below the {frames} frames of these latents")


def analyse_teacher(config: DistillConfig, store: LatentStore) -> None:
    """Draw `analysis.png` and print the boundary that it proposes."""

    def read(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = store.row(i)
        return torch.from_numpy(row.latents.copy()), torch.from_numpy(row.text.copy())

    result = analyse(config, read, len(store), report=print, null_text=null_of(store))
    picture = Path(config.output) / "analysis.png"
    draw_analysis(result, picture)
    print(f"{picture}: proposed boundary={result['boundary']:.4g}, in use {config.boundary:.4g}")


def say_plan(config: DistillConfig) -> None:
    """Print what each stage takes; nothing is written, no weight is read. Raises DoesNotFit."""
    latents, text = config.plan.latents, config.plan.text
    if not latents:
        with named("data", "makes of clips; or say their sizes with plan.latents and plan.text"):
            row = LatentStore(config.data).row(0)
        latents, text = row.latents.shape, row.text.shape
    require_fit(config.teacher, latents, text)
    require_own_networks(config)
    plans = list[StagePlan]()
    for name in config.stages:
        build_segment(config, name)
        require_frames(config, name, latents[1])
        plans.append(plan_stage(config, name, latents, text))
        print("\n".join(plan_lines(config, plans[-1])), flush=True)
    for plan in plans:
        require_it_fits(config, plan, latents, text)


def main() -> None:
    """Check everything, then train the stages and export the student."""
    config, switches = from_command_line(DistillConfig, sys.argv[1:], switches=SWITCHES)
    if "plan" in switches:
        say_plan(config)
        return
    stores = Stores.open(config)
    output, only_analyse = Path(config.output), "analyse" in switches
    digests = check(config, stores, analyse=only_analyse)
    output.mkdir(parents=True, exist_ok=True)
    if only_analyse:
        with disk_full_explained(output, DistillError):
            analyse_teacher(config, stores.video)
            dump(config, output / "analysis.yaml")
        return
    with disk_full_explained(output, DistillError), checkpoint.alone_in(output):
        distil(config, stores, digests)


def finished(config: DistillConfig) -> bool:
    """Whether every stage seems to have its last checkpoint, so that one Ray for both need not be started.

    Goes by sizes alone; `launch` reads every byte, and starts a Ray of its own should one be wrong.
    """
    newest = {n: checkpoint.newest_verified(Path(config.output), n, contents=False) for n in config.stages}
    return all(checkpoint.step_of(path) >= config.stage(name).num_steps for name, path in newest.items())


def distil(config: DistillConfig, stores: Stores, digests: dict[str, str]) -> None:
    """Train the stages on Ray, export the student."""
    output, done = Path(config.output), list[Path]()
    print(stores.summary(config), flush=True)
    with nullcontext() if finished(config) else cluster(config.scale):
        for name in config.stages:
            done.append(run_stage(config, name, stores, done[-1] if done else None, digests))
    dump(config, output / SETTINGS)  # also where nothing was left to train, and other plans are asked for
    damaged = [path for path in output.glob("quarantine-*.jsonl") if path.stat().st_size]
    if damaged:
        print(f"damaged rows were replaced by others: {', '.join(map(str, damaged))}")
    student = output / "student"
    write_student(config, student, Sample.of(stores.video), digests, tuple(done))
    print(f"student: {student}")


if __name__ == "__main__":
    run(main)
