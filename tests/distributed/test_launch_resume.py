"""Real Ray Train: workers die, checkpoints tear, errors travel; weights end as if nothing had happened."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import engine_cases
import launch_cases
import numpy as np
import pytest
import ray
import torch
from gloo_ranks import run_ranks
from launch_cases import (
    NUM_STEPS,
    SAVE_EVERY,
    STATE,
    feed,
    feed_with_a_bug,
    note_and_raise,
    train,
    unbroken,
)
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError, UserCodeException
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from safetensors.numpy import load_file
from shared_memory import left_since, shared_memory

from raydistill.config.distill import ScaleConfig
from raydistill.errors import DistillError, IncompatibleCheckpoint, InvalidValue, NonFiniteLoss
from raydistill.experts import launch as launching
from raydistill.experts.checkpoint import newest_verified
from raydistill.experts.launch import (
    RAYS_OWN,
    _raise_unless_lost,
    _reached,
    _require_room,
    _require_shared,
    _summary,
    cluster,
    launch,
)

for cases in (launch_cases, engine_cases):  # Ray's workers do not have this folder on their path
    ray.cloudpickle.register_pickle_by_value(cases)
pytestmark = pytest.mark.distributed
SCALE = ScaleConfig(num_workers=2, cpus_per_worker=0.5, max_failures=2)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of our own, or the one the test session has; our own must leave nothing behind."""
    ours, before = not ray.is_initialized(), shared_memory()
    with cluster(SCALE):
        yield
    if ours:
        assert not ray.is_initialized()
        assert not left_since(before)


def run(run_dir: Path, **accident) -> Path:
    """Launch the small training."""
    return launch(
        train, config=accident, scale=SCALE, state=STATE, num_steps=NUM_STEPS, run_dir=run_dir, feed=feed
    )


@pytest.mark.long
def test_killed_worker_resumes_bit_equal(local_ray, tmp_path, caplog):
    """SIGKILL of a random rank at a random step, and a flipped bit in the newest checkpoint then."""
    caplog.set_level(logging.WARNING, "raydistill.experts.launch")
    draw = random.Random(11)
    step, rank = draw.randrange(2 * SAVE_EVERY + 1, NUM_STEPS), draw.randrange(2)
    last = run(tmp_path, kind="kill", step=step, rank=rank)
    before_last = (step // SAVE_EVERY - 1) * SAVE_EVERY
    assert (tmp_path / "accidents").read_text() == f"0 {step}\n{before_last} {step}\n"
    assert last.name == f"semantic-step-{NUM_STEPS:06d}"
    assert "'semantic' was interrupted (1 of 2), resuming: rank " in caplog.text
    assert f"rank {rank}: WorkerHealthCheckFailedError: " in caplog.text
    run_ranks(unbroken, 2, tmp_path)
    assert same(load_file(tmp_path / "final.safetensors"), load_file(tmp_path / "unbroken.safetensors"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, NUM_STEPS + 1)), "steps that were done twice are recorded once"
    left = {"accidents", "checkpoints", "final.safetensors", "metrics.jsonl", "unbroken.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == left


def same(ours: dict, theirs: dict) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.long
def test_our_errors_come_back_as_they_are(local_ray, tmp_path):
    """NonFiniteLoss keeps type and fields, and is not retried: it would come again."""
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, kind="nan", step=4, rank=1)
    assert (caught.value.term, caught.value.step) == ("consistency", 4)
    assert (tmp_path / "accidents").read_text() == "0 4\n"
    assert newest_verified(tmp_path, "semantic").name == "semantic-step-000003"
    with pytest.raises(IncompatibleCheckpoint, match="resume"):
        launch(train, config={}, scale=SCALE, state=STATE, num_steps=9, run_dir=tmp_path, resume=False)


@pytest.mark.long
def test_a_bug_before_the_first_step_is_not_tried_again(local_ray, tmp_path):
    """Neither one of the training function nor one of the data's loaders, though Ray wraps that one."""
    accident = {"kind": "none", "step": -1, "rank": -1}
    one = replace(SCALE, num_workers=1)
    what = {"config": accident, "scale": one, "state": STATE, "num_steps": NUM_STEPS}
    with pytest.raises(WorkerGroupError, match=r"size mismatch|inconsistent tensor size"):
        launch(note_and_raise, run_dir=tmp_path / "train", **what)
    assert (tmp_path / "train" / "accidents").read_text() == "started\n"
    with pytest.raises(WorkerGroupError) as caught:
        launch(train, run_dir=tmp_path / "load", feed=feed_with_a_bug, **what)
    assert "rank 0: UserCodeException: " in _summary(caught.value)
    assert list((tmp_path / "load").iterdir()) == []


def of_task(cause: Exception) -> RayTaskError:
    """What a worker gets from a task that failed."""
    return RayTaskError("load", "Traceback", cause, ip="10.0.0.1").as_instanceof_cause()


def test_a_node_that_does_not_see_the_output_is_named(tmp_path):
    """A local folder on several machines would hold a part of every checkpoint on each."""
    (tmp_path / RAYS_OWN).mkdir()
    (tmp_path / RAYS_OWN / "abc").touch()
    _require_shared(tmp_path, "abc")
    with pytest.raises(InvalidValue, match="must be storage that all machines share: node") as caught:
        _require_shared(tmp_path, "of an earlier start")
    assert (caught.value.key, caught.value.value) == ("output", str(tmp_path))


def test_workers_that_a_machine_cannot_hold_are_refused_and_a_cluster_may_grow(caplog):
    scale, there = ScaleConfig(num_workers=2, use_gpu=True), {"CPU": 4.0, "GPU": 1.0}
    with pytest.raises(InvalidValue, match=r"scale\.use_gpu = True: false, or a machine"):
        _require_room(scale, {"CPU": 4.0}, grows=False)
    with pytest.raises(InvalidValue, match="they need 2 GPU, it has 1") as refused:
        _require_room(scale, there, grows=False)
    assert refused.value.key == "scale.num_workers"
    _require_room(scale, there, grows=True)
    assert "wait until this cluster has grown: they need 2 GPU, it has 1" in caplog.text
    _require_room(scale, {"CPU": 4.0, "GPU": 2.0}, grows=False)
    _require_room(ScaleConfig(num_workers=2), {"CPU": 4.0}, grows=False)


def test_ray_train_never_starts_workers_again_by_itself(local_ray, tmp_path, monkeypatch):
    """It would with the first start's step and feed, also after a preemption; `launch` looks at the disk."""
    asked = []

    class Watched(TorchTrainer):
        def fit(self):
            asked.append(self.run_config.failure_config)
            raise SystemExit(1)  # what Ctrl-C comes to in Ray Train

    monkeypatch.setattr(launching, "TorchTrainer", Watched)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(tmp_path)
    assert interrupt.value.__notes__ == [f"'semantic' from step 0 of {NUM_STEPS}"]
    (limits,) = asked
    assert (limits.max_failures, limits.max_preemption_failures, limits.controller_failure_limit) == (0, 0, 0)


CASES = {
    "one died, the other saw it": ([ActorDiedError(), RuntimeError("Connection closed by peer")], False),
    "seen before Ray knew": ([RuntimeError("Connection closed by peer")], False),
    "a loader's machine died": ([of_task(ActorDiedError())], False),
    "a loader's data went with a machine": ([of_task(ObjectLostError("1", "", ""))], False),
    "a bug of a loader": ([of_task(TypeError("a bug"))], True),
    "a bug of a function of Ray Data": ([of_task(UserCodeException("UDF failed"))], True),
    "a bug of a loader that cannot travel": ([of_task(RayError("not serializable"))], True),
    "a bug": ([TypeError("a bug")], True),
    "a bug beside its victim": ([TypeError("a bug"), RuntimeError("Connection closed by peer")], True),
    "too large": ([torch.OutOfMemoryError("out of memory")], True),
    "workers could not start": ([], False),
}


@pytest.mark.parametrize("case", CASES)
def test_only_losses_are_retried(case):
    """What another start cannot mend is raised at once; everything is after the last attempt."""
    errors, raised = CASES[case]
    failure = WorkerGroupError("failed", dict(enumerate(errors)))
    if raised:
        with pytest.raises(WorkerGroupError):
            _raise_unless_lost(failure, stuck=False, last=False)
    else:
        _raise_unless_lost(failure, stuck=False, last=False)
    with pytest.raises(WorkerGroupError):
        _raise_unless_lost(failure, stuck=True, last=True)


@pytest.mark.parametrize("wrap", [lambda error: error, of_task])
def test_a_failure_that_got_nowhere_without_a_death_is_a_bug(wrap):
    """A RuntimeError that no lost worker explains."""
    failure = WorkerGroupError("failed", {0: wrap(RuntimeError("shapes do not fit"))})
    with pytest.raises(WorkerGroupError):
        _raise_unless_lost(failure, stuck=True, last=False)
    _raise_unless_lost(failure, stuck=False, last=False)
    assert _summary(failure) == "rank 0: RuntimeError: shapes do not fit"
    _raise_unless_lost(WorkerGroupError("failed", {0: ActorDiedError()}), stuck=True, last=False)


def test_our_errors_are_found_inside_rays(tmp_path):
    failure = WorkerGroupError("failed", {1: of_task(DistillError("no space left"))})
    with pytest.raises(DistillError, match="no space left"):
        _raise_unless_lost(failure, stuck=False, last=False)


def test_progress_is_a_record_or_a_checkpoint(tmp_path):
    assert _reached(tmp_path, "semantic") == 0
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "semantic", "step": 4}\n{"stage": "detail", "step": 9}\n'
    )
    assert _reached(tmp_path, "semantic") == 4
