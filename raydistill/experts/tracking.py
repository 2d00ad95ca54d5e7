"""Where a run's figures go: metrics.jsonl always, TensorBoard by default, W&B and MLflow by config.

On rank 0 only.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from raydistill.config.distill import TrackingConfig
from raydistill.errors import ConfigError

METRICS = "metrics.jsonl"


class Tracker:
    """Writes one line of figures per report."""

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: Mapping[str, Any]):
        """Open the loggers; `settings` is the resolved config, kept by W&B and MLflow beside the figures.

        Raises ConfigError if a logger is asked for whose package is not installed.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines = (run_dir / METRICS).open("a", encoding="utf-8")
        self._sinks: list[Callable[[int, dict[str, float]], None]] = []
        self._closers: list[Callable[[], None]] = [self._lines.close]
        if config.tensorboard:
            writer = SummaryWriter(str(run_dir / "tensorboard"))
            self._sinks.append(partial(_to_tensorboard, writer))
            self._closers.append(writer.close)
        if config.wandb:
            run = _package("wandb").init(
                project=config.wandb, dir=str(run_dir), config=dict(settings), resume="allow"
            )
            self._sinks.append(lambda at, values: run.log(values, step=at))
            self._closers.append(run.finish)
        if config.mlflow:
            mlflow = _package("mlflow")
            mlflow.set_experiment(config.mlflow)
            mlflow.start_run()
            self._sinks.append(lambda at, values: mlflow.log_metrics(values, step=at))
            self._closers.append(mlflow.end_run)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record figures after optimiser step `step` of `stage`."""
        self._lines.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._lines.flush()
        for sink in self._sinks:
            sink(step, {f"{stage}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flush and close everything."""
        for close in reversed(self._closers):
            close()


def _to_tensorboard(writer: SummaryWriter, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as missing:
        raise ConfigError(
            f"tracking.{name} is set but {name} is not installed: pip install {name}"
        ) from missing
