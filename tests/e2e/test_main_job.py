"""The main job, small: latents, Ray Data, Ray Train, DeepSpeed, both experts, a report at the end."""

import json
import random
import shutil
import sys
import time

import psutil
import pytest
import ray
import torch
from job_cases import job, job_here, load_job, write_latents
from safetensors.torch import load_file

from raydistill.artifacts import tree_digest
from raydistill.errors import IncompatibleCheckpoint
from raydistill.models.codec import build_tiny_codec
from raydistill.models.wan import build_tiny_teacher
from raydistill.student import load_student

pytestmark = [pytest.mark.e2e, pytest.mark.long]

NUM_STEPS = 8
STAGE = [f"num_steps={NUM_STEPS}", "global_batch=8", "optimizer.warmup_steps=1"]
TWO = ("scale.num_workers=2", "engine.zero_stage=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Untrained networks, latents of 16 clips, and a student distilled by two workers under ZeRO 2."""
    folder = tmp_path_factory.mktemp("main")
    teacher = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    rng = torch.Generator().manual_seed(0)
    for p in teacher.parameters():  # off the start, where gates are closed
        p.data.add_(0.05 * torch.randn(p.shape, generator=rng))
    teacher.transformer.save_pretrained(folder / "teacher")
    build_tiny_codec(0, width=8).save(folder / "codec")
    write_latents(folder / "latents", tree_digest(folder / "codec"), 16)
    distilled(folder, "two", *TWO)
    return folder


def distilled(folder, name, *settings, meanwhile=None):
    """Distil into `folder/name`, both stages, a few steps; return what the job said."""
    return job("distill", *arguments(folder, name, *settings), meanwhile=meanwhile)


def arguments(folder, name, *settings):
    """Settings of a run into `folder/name`."""
    stages = [f"{stage}.{value}" for stage in ("semantic", "detail") for value in STAGE]
    inputs = [f"teacher={folder}/teacher", f"codec={folder}/codec", f"data={folder}/latents"]
    micro = 8 if "scale.num_workers=1" in settings else 4
    sizes = [f"semantic.micro_batch={micro}", f"detail.micro_batch={micro}"]
    common = (f"output={folder}/{name}", "report_every=1", "save_every=2")
    return [*inputs, *common, *stages, *sizes, *settings]


def weights(run):
    """Every weight that training changed."""
    semantic = load_file(run / "student" / "semantic" / "diffusion_pytorch_model.safetensors")
    return semantic | load_file(run / "student" / "detail.safetensors")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", ["semantic", "detail"])
def test_one_worker_under_zero_3_goes_on_with_the_student_of_two_under_zero_2(made, stage):
    """From a checkpoint within either stage on: what it ends with is what the two end with."""
    last = [f"{stage}-step-{NUM_STEPS:06d}"]
    run = stopped(made, f"one-{stage}", *last, *(["detail-*"] if stage == "semantic" else []))
    job_here("distill", *arguments(made, run.name, "scale.num_workers=1", "engine.zero_stage=3"))
    ours, theirs = weights(run), weights(made / "two")
    assert ours.keys() == theirs.keys()
    start = load_file(made / "teacher" / "diffusion_pytorch_model.safetensors")
    moved = max(float((theirs[k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-4  # something was learnt
    near = 2e-2 * moved if stage == "semantic" else 2e-4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=near, msg=name)

    theirs, ours = figures(made / "two"), figures(run)
    assert list(ours) == list(theirs)
    again = [at for at, line in ours.items() if line != theirs[at]]
    first = (stage, NUM_STEPS - 1)  # a checkpoint every two steps
    assert again == list(theirs)[list(theirs).index(first) :]
    for at, values in theirs.items():
        losses = {k: v for k, v in values.items() if k.startswith(("loss/", "bucket/"))}
        # Of the whole batch, whichever rank saw it. Later weights differ by rounding, which AdamW widens.
        near = 1e-4 if at in (first, ("detail", 1)) else 2e-2
        assert {k: ours[at][k] for k in losses} == pytest.approx(losses, rel=near, abs=near), at


def stopped(folder, name, *later):
    """Copy the run of two workers to `name`, as it was before it had a student and these checkpoints."""
    shutil.copytree(folder / "two", folder / name, ignore=shutil.ignore_patterns(*later))
    shutil.rmtree(folder / name / "student")
    return folder / name


def figures(run):
    """What the run recorded, by stage and step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(line["stage"], line["step"]): line for line in lines}


def test_the_run_left_figures_a_student_and_no_rubbish(made):
    lines = [json.loads(line) for line in (made / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (s, n) for s in ("semantic", "detail") for n in range(1, NUM_STEPS + 1)
    ]
    assert {"loss/consistency", "loss/adversarial", "loss/critic", "loss/feature_matching"} <= lines[
        -1
    ].keys()
    assert any(key.startswith("bucket/") for key in lines[-1])
    assert list((made / "two" / "tensorboard").iterdir())
    student = load_student(made / "two" / "student", made / "teacher")
    assert set(student.fields) == {"semantic", "detail", "teacher"}


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(made, monkeypatch, capsys):
    """In this process: no Ray is needed to find that out."""
    distill, before = load_job("distill"), weights(made / "two")
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments(made, "two", *TWO)])
    distill.main()
    assert "student: " in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in weights(made / "two").items())
    sys.argv.append("guidance_scale=3")
    with pytest.raises(IncompatibleCheckpoint):
        distill.main()
    assert not ray.is_initialized()


def kill_a_worker(run, stage, draw):
    """Return what kills one training process, by SIGKILL, after a drawn step of the stage."""
    step = draw.randrange(1, NUM_STEPS - 1)

    def watch(process):
        while process.poll() is None and (stage, step) not in reached(run):
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]
        draw.choice(sorted(workers, key=lambda p: p.pid)).kill()

    return watch


def reached(run):
    """Stages and steps that the run has recorded so far."""
    try:
        lines = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()  # the last may be torn
    except FileNotFoundError:
        return set()
    return {(one["stage"], one["step"]) for one in map(json.loads, lines)}


@pytest.mark.timeout(1200)
def test_a_worker_killed_in_either_stage_leaves_no_trace_in_the_student(made):
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    stage = draw.choice(["semantic", "detail"])
    if stage == "detail":  # the first one is done
        stopped(made, "killed", "detail-*")
        lines = (made / "two" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (made / "killed" / "metrics.jsonl").write_text("".join(lines[:NUM_STEPS]))
    said = distilled(made, "killed", *TWO, meanwhile=kill_a_worker(made / "killed", stage, draw))
    assert said.count("was interrupted") == 1, (seed, said[-2000:])
    ours, theirs = weights(made / "killed"), weights(made / "two")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), seed
    steps = [json.loads(line) for line in (made / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 * NUM_STEPS, "steps that were done twice are recorded once"


def test_the_report_shows_teacher_and_student(made):
    students = f"students.dual=[{made}/two/student]"
    networks = [f"teacher={made}/teacher", f"codec={made}/codec"]
    sizes = ["num_clips=4", "reference_clips=8", "teacher_steps=[2,1]", "latency.rounds=1"]
    job("evaluate", students, *networks, *sizes, f"output={made}/evaluation")
    page = (made / "evaluation" / "report.html").read_text()
    assert "teacher" in page
    assert "dual" in page
    assert 'src="http' not in page
