"""Ray Train: workers, their share of the data, and what happens when one of them is lost.

A lost worker, and the same command run again, take one path: find the newest sound checkpoint, rebuild the
data feed from its step, start the workers anew.
"""

import logging
import math
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.data import Dataset, ExecutionOptions
from ray.train import (
    DataConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from raydistill.config.distill import ScaleConfig
from raydistill.errors import DistillError, IncompatibleCheckpoint, RaydistillError
from raydistill.experts import checkpoint
from raydistill.experts.progress import forget_after, progress
from raydistill.flow import connect

logger = logging.getLogger(__name__)

SETTINGS = {
    # Of 2 s: a lost worker and the end of a stage are noticed sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Workers stay where the job was started, so that relative paths keep their meaning.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
DATASET = "train"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one training process is told."""

    config: Any
    """What `launch` was given."""
    stage: str
    run_dir: Path
    rank: int
    world_size: int
    device: torch.device
    start_step: int
    """Optimizer steps that the checkpoint has behind it; 0 at the beginning."""
    resume_from: Path | None
    """Verified checkpoint to load, if any."""
    shard: Any = field(repr=False)
    """This worker's share of the feed from `start_step` on, a Ray DataIterator; None without a feed."""


Train = Callable[[Worker], None]
Feed = Callable[[int], Dataset]
"""Start step -> the data from there on, in order."""


def launch(
    train: Train,
    *,
    config: Any,
    scale: ScaleConfig,
    stage: str,
    num_steps: int,
    run_dir: str | Path,
    feed: Feed | None = None,
    resume: bool = True,
) -> Path:
    """Run `train(worker)` on every worker until the stage's last checkpoint is there; return that checkpoint.

    `run_dir` must be one place for the driver and all workers: a local folder, or shared storage.
    `train` is a module-level function; it loads `worker.resume_from` and saves through `checkpoint.save`.
    Errors that raydistill raises on purpose come back as they were and are not retried; lost workers are, as
    often as `scale.max_failures` says, from the newest sound checkpoint.
    """
    run_dir = Path(run_dir).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume and checkpoint.newest_verified(run_dir, stage):
        raise IncompatibleCheckpoint(
            f"{run_dir} has checkpoints of '{stage}': resume, or choose another output"
        )
    stuck_at = -1
    for attempt in range(scale.max_failures + 1):
        checkpoint.remove_unfinished(run_dir)
        newest = checkpoint.newest_verified(run_dir, stage)
        start = checkpoint.read_state(newest).step if newest else 0
        if newest and start >= num_steps:
            return newest
        forget_after(run_dir, stage, start)
        told = {"train": train, "config": config, "stage": stage, "run_dir": run_dir, "start_step": start}
        told |= {"resume_from": newest, "threads": scale.threads_per_worker, "fed": feed is not None}
        try:
            with progress(run_dir, stage, start, num_steps):
                _fit(told, scale, feed(start) if feed else None)
            break
        except TrainingFailedError as failure:
            _raise_unless_lost(failure, stuck=start == stuck_at, last=attempt == scale.max_failures)
            logger.warning(
                "a worker of '%s' was lost (%d of %d): resuming", stage, attempt + 1, scale.max_failures
            )
            stuck_at = start
    return _last_checkpoint(run_dir, stage, num_steps)


def _last_checkpoint(run_dir: Path, stage: str, num_steps: int) -> Path:
    newest = checkpoint.newest_verified(run_dir, stage)
    if newest is None or checkpoint.read_state(newest).step < num_steps:
        raise DistillError(
            f"'{stage}' ended before step {num_steps}: the newest sound checkpoint is {newest}"
        )
    return newest


@contextmanager
def cluster(scale: ScaleConfig) -> Iterator[None]:
    """Be connected to a Ray that has room for the workers and the data flow; see `flow.connect`."""
    needed = math.ceil(scale.num_workers * scale.cpus_per_worker) + 1
    with connect(num_cpus=max(os.cpu_count() or 1, needed)):
        yield


def _fit(told: dict[str, Any], scale: ScaleConfig, dataset: Dataset | None) -> None:
    """One group of workers, from start to end or to the first loss."""
    storage = told["run_dir"] / ".ray"
    if dataset is not None:
        dataset.context.enable_progress_bars = False  # our own shows what matters
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=told,
        torch_config=TorchConfig(backend="nccl" if scale.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker} | ({"GPU": 1} if scale.use_gpu else {}),
        ),
        run_config=RunConfig(
            # A name used before would make Ray resume by itself.
            name=f"{told['stage']}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),  # `launch` says what is worth saying
        ),
        datasets={DATASET: dataset} if dataset is not None else {},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    try:
        with _environment(SETTINGS), _interrupts_restored():
            trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)  # our checkpoints are elsewhere


def _train_loop(told: dict[str, Any]) -> None:
    """Runs in every worker process."""
    told = dict(told)
    train, fed = told.pop("train"), told.pop("fed")
    torch.set_num_threads(told.pop("threads"))
    context = ray.train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    shard = ray.train.get_dataset_shard(DATASET) if fed else None
    train(Worker(device=get_device(), shard=shard, **ranks, **told))


def _raise_unless_lost(failure: TrainingFailedError, *, stuck: bool, last: bool) -> None:
    """Return if starting again can help: something went away. Else raise what really went wrong."""
    errors = list(failure.worker_failures.values()) if isinstance(failure, WorkerGroupError) else []
    for error in errors:
        if isinstance(error, RaydistillError):
            raise error from failure
    raised = [e for e in errors if type(e).__module__.partition(".")[0] != "ray"]  # by the training function
    # The other ranks see a broken connection, a RuntimeError of torch; Ray may learn of the death after them.
    bugs = [e for e in raised if not isinstance(e, RuntimeError) or isinstance(e, torch.OutOfMemoryError)]
    nobody_died = bool(errors) and len(raised) == len(errors)
    if bugs or last or (nobody_died and stuck):
        raise failure


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, for the time of the block."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _interrupts_restored() -> Iterator[None]:
    """Give Ctrl-C back its meaning afterwards: Ray Train's handler outlives the training."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
