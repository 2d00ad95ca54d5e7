"""The main job, small: real files, Ray Data, Ray Train, DeepSpeed, both experts, a report at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raydistill.models.codec import build_tiny_codec
from raydistill.models.wan import build_tiny_teacher
from raydistill.student import load_student

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e

STAGE = ["num_steps=3", "global_batch=8", "optimizer.warmup_steps=1"]


def job(name, *settings):
    """Run a job as its user would; return what it said."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Untrained networks, 16 prepared clips, and a student distilled by two workers under ZeRO 2."""
    folder = tmp_path_factory.mktemp("main")
    teacher = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    rng = torch.Generator().manual_seed(0)
    for p in teacher.parameters():  # off the start, where gates are closed
        p.data.add_(0.05 * torch.randn(p.shape, generator=rng))
    teacher.transformer.save_pretrained(folder / "teacher")
    build_tiny_codec(0, width=8).save(folder / "codec")
    source = [f"source.path={folder}/world", "source.num_clips=16", f"encode.codec={folder}/codec"]
    job("prepare", f"output={folder}/latents", *source)
    distilled(folder, "two", "scale.num_workers=2", "engine.zero_stage=2")
    return folder


def distilled(folder, name, *settings):
    """Distil into `folder/name`, both stages, a few steps."""
    stages = [f"{stage}.{value}" for stage in ("semantic", "detail") for value in STAGE]
    inputs = [f"teacher={folder}/teacher", f"codec={folder}/codec", f"data={folder}/latents"]
    micro = 8 if "scale.num_workers=1" in settings else 4
    sizes = [f"semantic.micro_batch={micro}", f"detail.micro_batch={micro}"]
    job(
        "distill",
        *inputs,
        f"output={folder}/{name}",
        "report_every=1",
        "save_every=2",
        *stages,
        *sizes,
        *settings,
    )
    return folder / name


def weights(run):
    """Every weight that training changed."""
    semantic = load_file(run / "student" / "semantic" / "diffusion_pytorch_model.safetensors")
    return semantic | load_file(run / "student" / "detail.safetensors")


@pytest.mark.timeout(1200)
def test_one_worker_under_zero_3_trains_the_same_student_as_two_under_zero_2(made):
    run = distilled(made, "one", "scale.num_workers=1", "engine.zero_stage=3")
    ours, theirs = weights(run), weights(made / "two")
    assert ours.keys() == theirs.keys()
    start = load_file(made / "teacher" / "diffusion_pytorch_model.safetensors")
    moved = max(float((theirs[k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-4  # something was learnt
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-2 * moved, msg=name)


def test_the_run_left_figures_a_student_and_no_rubbish(made):
    lines = [json.loads(line) for line in (made / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (s, n) for s in ("semantic", "detail") for n in (1, 2, 3)
    ]
    assert {"loss/consistency", "loss/adversarial", "loss/critic", "loss/feature_matching"} <= lines[
        -1
    ].keys()
    assert any(key.startswith("bucket/") for key in lines[-1])
    assert list((made / "two" / "tensorboard").iterdir())
    student = load_student(made / "two" / "student", made / "teacher")
    assert set(student.fields) == {"semantic", "detail", "teacher"}
    assert not [p for p in Path("/dev/shm").iterdir() if p.name.startswith(("plasma", "torch_", "sem.mp"))]


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(made):
    before = weights(made / "two")
    distilled(made, "two", "scale.num_workers=2", "engine.zero_stage=2")  # nothing is left to do
    assert all(torch.equal(value, before[name]) for name, value in weights(made / "two").items())
    with pytest.raises(AssertionError, match="IncompatibleCheckpoint"):
        distilled(made, "two", "scale.num_workers=2", "engine.zero_stage=2", "guidance_scale=3")


def test_the_report_shows_teacher_and_student(made):
    students = f"students.dual=[{made}/two/student]"
    networks = [f"teacher={made}/teacher", f"codec={made}/codec"]
    sizes = ["num_clips=4", "reference_clips=8", "teacher_steps=[2,1]", "latency.rounds=1"]
    job("evaluate", students, *networks, *sizes, f"output={made}/evaluation")
    page = (made / "evaluation" / "report.html").read_text()
    assert "teacher" in page
    assert "dual" in page
    assert 'src="http' not in page
