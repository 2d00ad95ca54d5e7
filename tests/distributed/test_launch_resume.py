"""Real Ray Train: workers die, checkpoints tear, errors travel; weights end as if nothing had happened."""

import json
import random
from pathlib import Path

import engine_cases
import launch_cases
import numpy as np
import pytest
import ray
import torch
from gloo_ranks import run_ranks
from launch_cases import NUM_STEPS, SAVE_EVERY, feed, train, unbroken
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from safetensors.numpy import load_file

from raydistill.config.distill import ScaleConfig
from raydistill.errors import IncompatibleCheckpoint, NonFiniteLoss
from raydistill.experts.checkpoint import newest_verified
from raydistill.experts.launch import _raise_unless_lost, cluster, launch

for cases in (launch_cases, engine_cases):  # Ray's workers do not have this folder on their path
    ray.cloudpickle.register_pickle_by_value(cases)
pytestmark = pytest.mark.distributed
SCALE = ScaleConfig(num_workers=2, cpus_per_worker=0.5, max_failures=2)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of our own, or the one the test session has; our own must leave nothing behind."""
    ours, before = not ray.is_initialized(), set(Path("/dev/shm").iterdir())
    with cluster(SCALE):
        yield
    if ours:
        assert not ray.is_initialized()
        assert set(Path("/dev/shm").iterdir()) <= before


def run(run_dir: Path, **accident) -> Path:
    """Launch the small training."""
    return launch(
        train, config=accident, scale=SCALE, stage="semantic", num_steps=NUM_STEPS, run_dir=run_dir, feed=feed
    )


def test_killed_worker_resumes_bit_equal(local_ray, tmp_path):
    """SIGKILL of a random rank at a random step, and a flipped bit in the newest checkpoint then."""
    draw = random.Random(11)
    step, rank = draw.randrange(2 * SAVE_EVERY + 1, NUM_STEPS), draw.randrange(2)
    last = run(tmp_path, kind="kill", step=step, rank=rank)
    before_last = (step // SAVE_EVERY - 1) * SAVE_EVERY
    assert (tmp_path / "accidents").read_text() == f"0 {step}\n{before_last} {step}\n"
    assert last.name == f"semantic-step-{NUM_STEPS:06d}"
    run_ranks(unbroken, 2, tmp_path)
    assert same(load_file(tmp_path / "final.safetensors"), load_file(tmp_path / "unbroken.safetensors"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, NUM_STEPS + 1)), "steps that were done twice are recorded once"
    left = {"accidents", "checkpoints", "final.safetensors", "metrics.jsonl", "unbroken.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == left


def same(ours: dict, theirs: dict) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_our_errors_come_back_as_they_are(local_ray, tmp_path):
    """NonFiniteLoss keeps type and fields, and is not retried: it would come again."""
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, kind="nan", step=4, rank=1)
    assert (caught.value.term, caught.value.step) == ("consistency", 4)
    assert (tmp_path / "accidents").read_text() == "0 4\n"
    assert newest_verified(tmp_path, "semantic").name == "semantic-step-000003"
    with pytest.raises(IncompatibleCheckpoint, match="resume"):
        launch(train, config={}, scale=SCALE, stage="semantic", num_steps=9, run_dir=tmp_path, resume=False)
    assert launch(
        train, config={}, scale=SCALE, stage="semantic", num_steps=3, run_dir=tmp_path
    ).name.endswith("3")


CASES = {
    "one died, the other saw it": ([ActorDiedError(), RuntimeError("Connection closed by peer")], False),
    "seen before Ray knew": ([RuntimeError("Connection closed by peer")], False),
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


def test_the_same_failure_twice_without_a_death_is_a_bug():
    """A RuntimeError that no lost worker explains, twice at the same step."""
    failure = WorkerGroupError("failed", {0: RuntimeError("shapes do not fit")})
    with pytest.raises(WorkerGroupError):
        _raise_unless_lost(failure, stuck=True, last=False)
    _raise_unless_lost(WorkerGroupError("failed", {0: ActorDiedError()}), stuck=True, last=False)
