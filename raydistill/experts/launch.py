"""Ray Train: workers, their share of the data, and what happens when one of them is lost.

A lost worker, and the same command run again, take one path: find the newest sound checkpoint, rebuild the
data feed from its step, start the workers anew.
"""

import logging
import math
import os
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions
from ray.exceptions import RayError, RayTaskError, UserCodeException
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
from raydistill.errors import DistillError, IncompatibleCheckpoint, InvalidValue
from raydistill.experts import checkpoint
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.progress import forget_after, progress, read_metrics
from raydistill.flow import connect, raised_by_us

logger = logging.getLogger(__name__)

SETTINGS = {
    # Of 2 s: a lost worker and the end of a stage are noticed sooner.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Of 60 s: a growing cluster takes minutes to bring a machine. Another start is counted as a loss.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    # Workers stay where the job was started, so that relative paths keep their meaning.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # One process less for each stage: nobody asks what it finds out. A machine that is taken away is a loss.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
DATASET = "train"
RAYS_OWN = ".ray"
"""Below the run folder, while workers run."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one training process is told."""

    config: Any
    """What `launch` was given."""
    state: TrainState
    """What the run's checkpoints say, but for the step."""
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

    @property
    def stage(self) -> str:
        """'semantic' or 'detail'."""
        return self.state.stage


Train = Callable[[Worker], None]
Feed = Callable[[int], Dataset]
"""Start step -> the data from there on, in order."""


def launch(
    train: Train,
    *,
    config: Any,
    scale: ScaleConfig,
    state: TrainState,
    num_steps: int,
    run_dir: str | Path,
    feed: Feed | None = None,
    resume: bool = True,
) -> Path:
    """Run `train(worker)` on every worker until the stage's last checkpoint is there; return that checkpoint.

    `run_dir` must be one place for the driver and all workers: a local folder, or shared storage.
    `state` says which stage of which run this is; its step is not looked at. `train` is a module-level
    function; it loads `worker.resume_from` and saves through `checkpoint.save`. Ray is started if it is not
    connected, but not for a stage that is done.
    Errors that raydistill raises on purpose come back as they were and are not retried; lost workers are, as
    often as `scale.max_failures` says, from the newest sound checkpoint. Raises InvalidValue if a worker does
    not see `run_dir`, IncompatibleCheckpoint if it holds the checkpoints of another run, or any without
    `resume`.
    """
    run_dir, stage, stuck_at = Path(run_dir).resolve(), state.stage, -1
    run_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(scale.max_failures + 1):
        checkpoint.remove_unfinished(run_dir)
        newest = checkpoint.newest_verified(run_dir, stage)
        if newest and not attempt:
            _require_ours(newest, state, resume)
        start = checkpoint.step_of(newest)
        if newest and start >= num_steps:
            return newest
        forget_after(run_dir, stage, start)
        told = {"train": train, "config": config, "state": state, "run_dir": run_dir, "start_step": start}
        told |= {"resume_from": newest, "threads": scale.threads_per_worker, "fed": feed is not None}
        try:
            with cluster(scale), progress(run_dir, stage, start, num_steps):
                _fit(told, scale, feed(start) if feed else None)
            break
        except KeyboardInterrupt as interrupt:
            done = checkpoint.step_of(checkpoint.newest_verified(run_dir, stage, contents=False))
            interrupt.add_note(f"'{stage}' from step {done} of {num_steps}")
            raise
        except TrainingFailedError as failure:
            stuck = start == stuck_at or _reached(run_dir, stage) <= start
            _raise_unless_lost(failure, stuck=stuck, last=attempt == scale.max_failures)
            count = f"{attempt + 1} of {scale.max_failures}"
            logger.warning("'%s' was interrupted (%s), resuming: %s", stage, count, _summary(failure))
            stuck_at = start
    return _last_checkpoint(run_dir, stage, num_steps)


def _require_ours(newest: Path, state: TrainState, resume: bool) -> None:
    """Refuse a folder of another run, or of any without `resume`, also where nothing is left to do."""
    if not resume:
        raise IncompatibleCheckpoint(
            f"{newest.parents[1]} has checkpoints of '{state.stage}': resume, or choose another output"
        )
    checkpoint.require_same_run(newest, state)


def _last_checkpoint(run_dir: Path, stage: str, num_steps: int) -> Path:
    newest = checkpoint.newest_verified(run_dir, stage)
    if newest is None or checkpoint.step_of(newest) < num_steps:
        raise DistillError(
            f"'{stage}' ended before step {num_steps}: the newest sound checkpoint is {newest}"
        )
    return newest


def _reached(run_dir: Path, stage: str) -> int:
    """Return the last optimizer step of which there is a trace: a record, or a checkpoint."""
    newest = checkpoint.newest_verified(run_dir, stage, contents=False)
    steps = [record["step"] for record in read_metrics(run_dir, stage)]
    return max(*steps, checkpoint.step_of(newest), 0)


@contextmanager
def cluster(scale: ScaleConfig) -> Iterator[None]:
    """Be connected to a Ray that has room for the workers and the data flow; see `flow.connect`.

    Raises InvalidValue if a Ray of our own has not; of a cluster that is joined, and may grow, it is logged.
    """
    needed, connected = math.ceil(scale.num_workers * scale.cpus_per_worker) + 1, ray.is_initialized()
    with connect(num_cpus=max(os.cpu_count() or 1, needed)):
        if not connected:
            _require_room(scale, ray.cluster_resources(), grows=bool(os.environ.get("RAY_ADDRESS")))
        yield


def _require_room(scale: ScaleConfig, there: Mapping[str, float], *, grows: bool) -> None:
    """Say what the workers would wait for: Ray Train waits in silence."""
    if scale.use_gpu and not there.get("GPU") and not grows:
        raise InvalidValue("scale.use_gpu", True, "false, or a machine on which Ray finds a GPU")
    asked = {"CPU": scale.num_workers * scale.cpus_per_worker} | (
        {"GPU": float(scale.num_workers)} if scale.use_gpu else {}
    )
    short = [
        f"{n:g} {kind}, it has {there.get(kind, 0):g}" for kind, n in asked.items() if n > there.get(kind, 0)
    ]
    if not short:
        return
    if grows:
        logger.warning("the workers wait until this cluster has grown: they need %s", "; ".join(short))
        return
    raise InvalidValue(
        "scale.num_workers",
        scale.num_workers,
        f"fewer, this machine cannot hold them: they need {'; '.join(short)}",
    )


def _fit(told: dict[str, Any], scale: ScaleConfig, dataset: Dataset | None) -> None:
    """One group of workers, from start to end or to the first loss."""
    storage, token = told["run_dir"] / RAYS_OWN, uuid.uuid4().hex
    if dataset is not None:
        dataset.context.enable_progress_bars = False  # our own shows what matters
    trainer = TorchTrainer(
        _train_loop,
        # In bytes: Ray Train's controller, a process of its own, need not import what only workers run.
        train_loop_config={"told": ray.cloudpickle.dumps(told | {"token": token})},
        torch_config=TorchConfig(backend="nccl" if scale.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker} | ({"GPU": 1} if scale.use_gpu else {}),
        ),
        run_config=RunConfig(
            # A name used before would make Ray resume by itself.
            name=f"{told['state'].stage}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage),
            # Ray's own second start would go on from `told`, which is old by then: `launch` makes it.
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            logging_config=LoggingConfig(log_level="ERROR"),  # `launch` says what is worth saying
        ),
        datasets={DATASET: dataset} if dataset is not None else {},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    try:
        storage.mkdir(exist_ok=True)
        (storage / token).touch()
        with _environment(SETTINGS), _interrupts_restored():
            trainer.fit()
    except SystemExit as ended:  # Ray Train's answer to Ctrl-C, with a status of its own
        raise KeyboardInterrupt from ended
    finally:
        shutil.rmtree(storage, ignore_errors=True)  # our checkpoints are elsewhere


def _train_loop(config: dict[str, bytes]) -> None:
    """Runs in every worker process."""
    told: dict[str, Any] = ray.cloudpickle.loads(config["told"])
    train, fed = told.pop("train"), told.pop("fed")
    torch.set_num_threads(told.pop("threads"))
    context = ray.train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    _require_shared(told["run_dir"], told.pop("token"))
    shard = ray.train.get_dataset_shard(DATASET) if fed else None
    train(Worker(device=get_device(), shard=shard, **ranks, **told))


def _require_shared(run_dir: Path, token: str) -> None:
    """Raise InvalidValue unless this worker sees the file that the driver has just written.

    Without one place for all, every machine would keep its own part of a checkpoint, and none a whole one.
    """
    if not (run_dir / RAYS_OWN / token).is_file():
        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        raise InvalidValue(
            "output",
            str(run_dir),
            f"must be storage that all machines share: node {node} does not see what the driver wrote there",
        )


def _raise_unless_lost(failure: TrainingFailedError, *, stuck: bool, last: bool) -> None:
    """Return if starting again can help: something went away. Else raise what really went wrong.

    `stuck` says that the attempt got nowhere: then a failure in which nobody died is a bug.
    """
    for error in _errors(failure).values():
        if ours := raised_by_us(error):
            raise ours from failure
    errors = [_cause(error) for error in _errors(failure).values()]
    raised = [e for e in errors if not _is_death(e)]  # by the training function, or by a data loader
    # The other ranks see a broken connection, a RuntimeError of torch; Ray may learn of the death after them.
    bugs = [e for e in raised if not isinstance(e, RuntimeError) or isinstance(e, torch.OutOfMemoryError)]
    nobody_died = bool(errors) and len(raised) == len(errors)
    if bugs or last or (nobody_died and stuck):
        raise failure


def _errors(failure: TrainingFailedError) -> dict[int, Exception]:
    """Return what each rank failed with; empty where the workers could not start."""
    return failure.worker_failures if isinstance(failure, WorkerGroupError) else {}


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong in the task or actor whose failure reached a worker."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _is_death(error: BaseException) -> bool:
    """Whether Ray says that a process, a machine or an object is gone, and not what was raised there."""
    if (
        isinstance(error, RayTaskError | UserCodeException) or type(error) is RayError
    ):  # of what cannot travel
        return False
    return type(error).__module__.partition(".")[0] == "ray"


def _summary(failure: TrainingFailedError) -> str:
    """Return one line per rank, or the failure's first."""
    lines = []
    for rank, error in _errors(failure).items():
        cause = _cause(error)
        lines.append(f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}")
    return "; ".join(lines) or _first_line(failure)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


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
