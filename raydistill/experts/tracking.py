"""Where a run's figures go: metrics.jsonl always, TensorBoard by default, W&B and MLflow by config.

On rank 0 only. A run folder is one run everywhere: both stages, and every restart, go on in it.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from raydistill.artifacts import write_json
from raydistill.config.distill import TrackingConfig
from raydistill.errors import ConfigError, DistillError, disk_full_explained

METRICS = "metrics.jsonl"
IDS = "tracking.json"
"""Under which names the run is known elsewhere."""

Sink = Callable[[str, int, Mapping[str, float]], None]
"""Takes stage, optimizer step and figures."""


def require_installed(config: TrackingConfig) -> None:
    """Raise ConfigError if a logger is asked for whose package is not installed. For the start of a job."""
    for name in ("wandb", "mlflow"):
        if getattr(config, name):
            _package(name)


class Tracker:
    """Writes one line of figures per report."""

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any]):
        """Open the loggers; `settings` is the resolved config, kept by W&B and MLflow beside the figures.

        Raises ConfigError if a logger is asked for whose package is not installed, DistillError if the disk
        is full; `write` and `close` do so too.
        """
        self._path = run_dir / METRICS
        self._sinks: list[Sink] = []
        self._opened = ExitStack()
        with disk_full_explained(self._path, DistillError):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lines = self._opened.enter_context(self._path.open("a", encoding="utf-8"))
            if config.tensorboard:
                self._sinks.append(_tensorboard(self._opened, run_dir))
            if config.wandb:
                self._sinks.append(_wandb(self._opened, config.wandb, run_dir, settings))
            if config.mlflow:
                self._sinks.append(_mlflow(self._opened, config.mlflow, run_dir, settings))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record figures after optimiser step `step` of `stage`."""
        with disk_full_explained(self._path, DistillError):
            self._lines.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
            self._lines.flush()
            for sink in self._sinks:
                sink(stage, step, {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flush and close everything."""
        with disk_full_explained(self._path, DistillError):
            self._opened.close()


def _tensorboard(opened: ExitStack, run_dir: Path) -> Sink:
    """One folder of event files per stage, as each counts its steps from 1."""
    writers: dict[str, SummaryWriter] = {}

    def sink(stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in writers:
            # From this step on, what an earlier start has written is hidden: it is done again.
            # Its thread ends where the disk is full, and a bounded queue would then block for ever.
            folder = str(run_dir / "tensorboard" / stage)
            writers[stage] = SummaryWriter(folder, purge_step=step, max_queue=0)
            opened.callback(writers[stage].close)
        for name, value in values.items():
            writers[stage].add_scalar(name, value, step)
        writers[stage].flush()

    return sink


def _wandb(opened: ExitStack, project: str, run_dir: Path, settings: Mapping[str, Any]) -> Sink:
    key = f"wandb/{project}"
    known = _ids(run_dir).get(key) or uuid.uuid4().hex[:12]
    run = _package("wandb").init(
        project=project, id=known, resume="allow", dir=str(run_dir), config=dict(settings)
    )
    opened.callback(run.finish)
    _keep_id(run_dir, key, known)
    stages: set[str] = set()

    def sink(stage: str, step: int, values: Mapping[str, float]) -> None:
        if (
            stage not in stages
        ):  # W&B's own counter may only grow; a second stage or a resumed one counts anew
            stages.add(stage)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run.log({**values, f"{stage}/step": step})

    return sink


def _mlflow(opened: ExitStack, experiment: str, run_dir: Path, settings: Mapping[str, Any]) -> Sink:
    key, mlflow = f"mlflow/{experiment}", _package("mlflow")
    known = _ids(run_dir).get(key)
    mlflow.set_experiment(experiment)
    run = mlflow.start_run(run_id=known)
    opened.callback(mlflow.end_run)
    if known is None:  # parameters may not change, and a resumed run may have other workers
        mlflow.log_params(dict(_leaves(settings)))
        _keep_id(run_dir, key, run.info.run_id)
    return lambda stage, step, values: mlflow.log_metrics(dict(values), step=step)


def _ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDS
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _keep_id(run_dir: Path, key: str, known: str) -> None:
    write_json(run_dir / IDS, {**_ids(run_dir), key: known})


def _leaves(settings: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ('engine.zero_stage', 2) and so on."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as missing:
        raise ConfigError(
            f"tracking.{name} is set but {name} is not installed: pip install {name}"
        ) from missing
