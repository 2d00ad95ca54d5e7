"""Two gloo ranks with half batches against one torch process with whole ones, over every ZeRO stage."""

import subprocess
import sys

import numpy as np
import pytest
from engine_cases import ENGINES, LOW, PAIRS, adversarial, continued, everything, outcome
from gloo_ranks import run_ranks
from shared_memory import left_since, shared_memory

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks, and what their job left in /dev/shm."""
    folder = tmp_path_factory.mktemp("parts")
    before = shared_memory()
    both = run_ranks(everything, 2, folder)
    return {"both": both, "folder": folder, "left": left_since(before)}


def distance(ours: dict, theirs: dict) -> float:
    """Largest absolute difference between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[n] - theirs[n]).max()) for n in ours)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_equal_one(ranks, name, accumulation):
    """Weights, losses and gradient norm within rounding, whatever is sharded; clipping is active."""
    alone = outcome(accumulation, backend="torch")
    first, second = (result["run", name, accumulation] for result in ranks["both"])
    assert distance(first["weights"], alone["weights"]) < 1e-6
    assert distance(first["module"], alone["module"]) < 1e-6
    assert distance(first["weights"], second["weights"]) == 0
    np.testing.assert_allclose(np.add(first["losses"], second["losses"]) / 2, alone["losses"], rtol=1e-5)
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert first["norm"] > 0.05, "clipping must have something to clip"
    assert first["rate"] == alone["rate"]


def test_training_changed_the_weights(ranks):
    """The comparisons are not of untouched weights, and clipping and accumulation matter."""
    results = ranks["both"][0]
    runs = [results["run", "zero2", a]["weights"] for a in (1, 4)]
    runs.append(outcome(4, clipping=0.0, backend="torch")["weights"])
    runs.append(outcome(4, clipping=0.05, backend="torch")["weights"])
    assert distance(runs[0], runs[1]) > 1e-3
    assert distance(runs[2], runs[3]) > 1e-4


@pytest.mark.parametrize("name", LOW)
def test_bf16_is_near_plain_bf16(ranks, name):
    """Master weights stay float32: rounding shows in the gradients alone."""
    alone = outcome(4, precision="bf16", backend="torch")
    first = ranks["both"][0]["bf16", name]
    assert distance(first["weights"], alone["weights"]) < 2e-3
    assert distance(first["module"], alone["module"]) < 1e-2


@pytest.mark.parametrize("name", ENGINES)
def test_resume_is_bit_equal(ranks, name):
    """Saved after 3 steps and taken up by a new engine: as if nothing had happened."""
    for result in ranks["both"]:
        assert distance(**_named(result["resume", name])) == 0


@pytest.mark.parametrize("name", LOW)
def test_resume_is_bit_equal_in_bf16(ranks, name):
    """The float32 masters are what is saved."""
    for result in ranks["both"]:
        assert distance(**_named(result["resume-bf16", name])) == 0


@pytest.mark.parametrize("settings", [{"backend": "torch"}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_one_rank_continues_what_two_began(ranks, settings):
    """Parts are whole tensors: other world sizes and ZeRO stages read them."""
    whole = ranks["both"][0]["resume", "zero3"]["unbroken"]
    assert distance(ranks["both"][0]["continue"], whole) < 1e-6
    assert distance(continued(ranks["folder"] / "zero3", **settings), whole) < 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_through_the_critic(ranks, name):
    """Both roles equal plain torch; the critic feels nothing of the student's turn."""
    alone = adversarial(2, {"backend": "torch"}, {"backend": "torch"})
    first = ranks["both"][0]["critic", name]
    assert distance(first["student"], alone["student"]) < 1e-6
    assert distance(first["critic"], alone["critic"]) < 1e-6


def test_nothing_stays_in_shared_memory(ranks):
    """DeepSpeed's shared-memory all-reduce would leave 66 MiB per rank."""
    assert not ranks["left"]


def test_deepspeed_says_nothing():
    """Building and stepping an engine prints nothing; progress belongs to the driver."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import engine_cases as e; e.outcome(2, zero_stage=3)"
    command = [sys.executable, "-c", code, *(p for p in sys.path if p)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def _named(result: dict) -> dict:
    return {"ours": result["resumed"], "theirs": result["unbroken"]}
