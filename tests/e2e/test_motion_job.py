"""A motion student from files to figures: poor videos, good images, recorded paths, workers, refusals."""

import json
import re
import sys

import pytest
import ray
import torch
from job_cases import job, job_here, load_job, write_latents
from motion_cases import teacher
from safetensors.torch import load_file
from shared_memory import left_since, shared_memory

from raydistill.artifacts import tree_digest
from raydistill.config.load import run
from raydistill.flow import connect
from raydistill.models.codec import build_tiny_codec
from raydistill.models.frame_features import FrameNet
from raydistill.student import load_student

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]
STEPS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Untrained networks and latents of clips; images, recorded paths and a student, all by the jobs."""
    folder = tmp_path_factory.mktemp("motion")
    teacher().network.save_pretrained(folder / "teacher")
    teacher(1).network.save_pretrained(folder / "other")
    for seed, name in enumerate(("codec", "codec2")):
        build_tiny_codec(seed, width=8).save(folder / name)
    torch.manual_seed(0)
    FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(folder / "features")
    files = ["source.kind=sprite_images", f"source.path={folder}/image-files", "source.num_clips=12"]
    job("prepare", f"output={folder}/images", f"encode.codec={folder}/codec", *files)
    write_latents(folder / "videos", tree_digest(folder / "codec"), 12)
    before = shared_memory()
    with connect(num_cpus=3, object_store_mib=200):
        said = job_here("prepare", f"output={folder}/paths", *recording(folder))
        assert "trajectories: " in said
        job_here("distill", *settings(folder, "two", "scale.num_workers=2", "engine.zero_stage=2"))
    assert not left_since(before)
    return folder


def recording(folder):
    record = {
        "teacher": f"{folder}/teacher",
        "num_paths": 6,
        "paths_per_shard": 3,
        "guidance_range": "[1.5,2.5]",
    }
    record |= {"grid.num_intervals": 5}
    source = ["source.kind=trajectories", f"source.path={folder}/videos"]
    return [*source, *(f"record.{key}={value}" for key, value in record.items())]


def settings(folder, name, *more):
    stage = {
        "num_steps": STEPS,
        "global_batch": 8,
        "micro_batch": 2,
        "optimizer.warmup_steps": 1,
        "lora_rank": 2,
    }
    stage |= {"objective.appearance": 0.5, "appearance.features": f"{folder}/features"}
    stage |= {"appearance.images_per_step": 4, "appearance.channels": 8}
    inputs = {"teacher": f"{folder}/teacher", "codec": f"{folder}/codec", "data": f"{folder}/videos"}
    inputs |= {
        "images": f"{folder}/images",
        "mix.trajectories": f"{folder}/paths",
        "output": f"{folder}/{name}",
    }
    mix = {"mix.real_share": 0.5, "mix.recorded_share": 0.25, "guidance_range": "[1.5,2.5]"}
    run = {"experts": "motion", "grid.num_intervals": 5, "report_every": 1, "save_every": 2}
    run |= {"sampling.num_steps": "[1,2,4]"}
    given = {**inputs, **mix, **run, **{f"motion.{key}": value for key, value in stage.items()}}
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def figures(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("loss/")} for line in lines}


@pytest.fixture(scope="module")
def two(made):
    """The student's run."""
    return made / "two"


def test_a_student_that_a_diffusers_pipeline_could_load(made, two):
    state = load_file(two / "student" / "pytorch_lora_weights.safetensors")
    assert state
    assert all(key.startswith("transformer.") and ".lora_" in key for key in state)
    assert max(float(w.abs().max()) for k, w in state.items() if "lora_B" in k) > 0  # something was learnt
    student = load_student(two / "student", made / "teacher")
    assert (student.kind, student.card.guidance_range, list(student.plans)) == (
        "motion",
        (1.5, 2.5),
        ["1", "2", "4"],
    )
    x, text = torch.randn(2, 4, 16, 4, 4), torch.randn(2, 8, 32)
    assert student.fields["semantic"](x, torch.tensor([0.9, 0.2]), text).shape == x.shape


def test_every_role_left_its_figures(two):
    """That they do not depend on workers and ZeRO's stage is test_motion_ranks' business."""
    names = {"motion", "motion_head", "appearance", "image_critic_real", "image_critic_fake"}
    seen = figures(two)
    assert set(seen) == set(range(1, STEPS + 1))
    assert all({key.removeprefix("loss/") for key in step} == names for step in seen.values())


def test_it_is_measured_beside_its_teacher(made, two):
    inputs = [f"teacher={made}/teacher", f"codec={made}/codec", f"students.motion=[{two}/student]"]
    sizes = ["num_clips=4", "reference_clips=8", "num_draws=20", "teacher_steps=[5]", "student_steps=[4,2]"]
    sizes += ["judge=none", "latency.rounds=0", f"output={made}/evaluation"]
    job_here("evaluate", *inputs, *sizes)
    table = (made / "evaluation" / "report" / "table.md").read_text()
    head = re.search(r"\| sampler .*", table)
    assert head is not None
    assert all(name in head[0] for name in ("sharpness", "watermark", "spectrum", "vividness"))
    assert "| motion 4 | 4 |" in table
    assert "motion 4: watermark, less teacher 5's" in table
    assert "dual" not in table


@pytest.fixture(scope="module")
def distill():
    """The job, in this process: its refusals need no Ray."""
    return load_job("distill")


REFUSED = {
    "made of images, or motion.objective.appearance=0": ["images=''", "motion.objective.appearance=1"],
    "holds clips of 16 latent frames, not images": ["images={folder}/videos"],
    "(images= names a folder that jobs/prepare.py with source.kind=images makes)": ["images={folder}/paths"],
    "(data= names a folder that jobs/prepare.py made with another encode.codec": ["codec={folder}/codec2"],
    "no feature net at": ["motion.appearance.features={folder}/nowhere"],
    "guidance_range": ["guidance_range=[1.5,3.5]"],
    "mix.real_share": ["mix.real_share=1.5"],
    "max_images = 13: at most the 12 of": ["max_images=13"],
    "was made otherwise than asked for (found != expected): teacher": ["teacher={folder}/other"],
    "is not there": ["mix.trajectories={folder}/nowhere"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_starts(made, distill, said, monkeypatch, capsys):
    changed = [value.format(folder=made) for value in REFUSED[said]]
    monkeypatch.setattr(sys, "argv", ["distill.py", *settings(made, "refused", *changed)])
    with pytest.raises(SystemExit) as ended:
        run(distill.main)
    assert ended.value.code in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (made / "refused").exists()
    assert not ray.is_initialized()
