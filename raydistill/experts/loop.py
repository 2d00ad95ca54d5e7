"""The training loop: draw, backward, step, average, report, save. One worker's view."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from raydistill.errors import NonFiniteLoss
from raydistill.experts.meter import Meter
from raydistill.experts.protocols import Engine
from raydistill.experts.semantic import Losses, consistency_losses
from raydistill.experts.stages import Companion, Stage
from raydistill.types import Batch

Report = Callable[[int, dict[str, float]], None]
"""Called with the optimiser step and figures; every rank calls it."""
NUM_LEVELS = 5
"""Ranges of noise that losses are reported for."""
Save = Callable[[int], None]


def require_finite(losses: Losses, step: int) -> None:
    """Raise NonFiniteLoss naming the first term that is NaN or infinite."""
    for name, term in losses.terms.items():
        total = float(term.value.sum())
        if not math.isfinite(total):
            raise NonFiniteLoss(name, step, total)


def require_finite_gradient(engine: Engine, term: str) -> None:
    """Raise NonFiniteLoss unless the optimizer step just done had a finite gradient norm.

    A finite loss may have a gradient that is not. Some engines then put NaN into the weights, others leave
    the step out without a word, and one calls the norm -1.
    """
    norm = engine.grad_norm
    if norm is None or not 0.0 <= norm < math.inf:
        value = math.inf if norm == math.inf else math.nan
        raise NonFiniteLoss(term, engine.steps - 1, value)


def draw(stage: Stage, batch: Batch) -> tuple[Losses, dict[str, Any]]:
    """One draw of the stage's loss, and what its companions keep for their own turns."""
    looks = {name: companion.look for name, companion in stage.companions.items()}
    drawn = consistency_losses(stage.nets, stage.segment, batch, stage.config.objective, looks)
    if stage.shards is not None:
        stage.shards.release()
    return drawn


def take_turn(name: str, companion: Companion, seen: Any, meter: Meter) -> None:
    """Teach a companion on what it saw in the student's turn."""
    engine = companion.engine
    if engine is None or companion.turn is None:
        return
    turn = companion.turn(seen)
    require_finite(turn, engine.steps)
    meter.add(turn)
    engine.backward(turn.total)
    if engine.step():
        require_finite_gradient(engine, f"gradient norm of the {name.replace('_', ' ')}")


def distill(
    stage: Stage, batches: Iterable[Batch], *, report_every: int, save_every: int, report: Report, save: Save
) -> None:
    """Train until `stage.config.num_steps` from wherever the engine stands; `batches` starts at that step."""
    meter = Meter(stage.segment.levels(NUM_LEVELS))
    engine, began, since = stage.engine, time.perf_counter(), stage.engine.steps
    if engine.steps >= stage.config.num_steps:
        return
    for batch in batches:
        losses, seen = draw(stage, batch)
        require_finite(losses, engine.steps)
        meter.add(losses)
        engine.backward(losses.total)
        for name, companion in stage.companions.items():
            take_turn(name, companion, seen[name], meter)
        del losses, seen
        if not engine.step():
            continue
        require_finite_gradient(engine, "gradient norm")
        stage.update_averages()
        step, done = engine.steps, engine.steps == stage.config.num_steps
        if step % report_every == 0 or done:
            rate = (step - since) / (time.perf_counter() - began)
            figures = {
                "grad_norm": engine.grad_norm or 0.0,
                "learning_rate": engine.learning_rate,
                "steps_per_s": rate,
            }
            report(step, meter.read() | figures | _memory())
            began, since = time.perf_counter(), step
        if step % save_every == 0 or done:
            save(step)
        if done:
            return


def _memory() -> dict[str, float]:
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}
