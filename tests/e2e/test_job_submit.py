"""`ray job submit --working-dir . -- python jobs/distill.py ...` on a head of our own that wants a token."""

import subprocess
from pathlib import Path

import pytest
from ray_head import ray_head

from raydistill.student import load_student

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.long]


@pytest.fixture(scope="module")
def head():
    with ray_head() as running:
        yield running


def submit(head, *command: str) -> subprocess.CompletedProcess:
    address, environment = head
    line = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *command]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=480)


@pytest.mark.timeout(1000)
def test_prepare_and_distill_run_on_a_running_head(head, tmp_path):
    """Absolute paths for all that should last: a submitted job runs in a copy of the folder."""
    world = ["source.path=" + str(tmp_path / "world"), "source.num_clips=24"]
    latents, run = tmp_path / "latents", tmp_path / "run"
    prepared = submit(head, "python", "jobs/prepare.py", *world, f"output={latents}")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    job = [
        "python",
        "jobs/distill.py",
        "--config",
        "jobs/tiny/smoke.yaml",
        f"data={latents}",
        f"output={run}",
        "experts=dual_full",
        "scale.num_workers=1",
    ]
    distilled = submit(head, *job)
    assert distilled.returncode == 0, distilled.stdout + distilled.stderr
    assert set(load_student(run / "student").fields) == {"semantic", "detail"}
    assert load_student(run / "student").kind == "dual_full"
    assert "student: " in distilled.stdout


def test_the_token_is_asked_for(head):
    address, environment = head
    done = submit((address, environment | {"RAY_AUTH_MODE": "disabled"}), "true")
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
