"""DCM and MCM, with the papers' settings, on a small random model of every real class: two workers, ZeRO."""

import json
import shutil

import pipeline_cases
import pytest
import torch
from job_cases import job_here, load_job
from real_cases import DCM, UNETS, settings, write_inputs
from safetensors.torch import load_file
from shared_memory import left_since, shared_memory

from raydistill.artifacts import LatentStore
from raydistill.errors import InvalidValue, MissingArtifact
from raydistill.flow import connect
from raydistill.models.prompts import PromptEncoder
from raydistill.models.text import NULL, null_of, text_identity
from raydistill.sampler import keyed_noise, sample
from raydistill.service.bundle import verify_bundle
from raydistill.student import load_student

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
FIRST, *OTHERS = DCM


@pytest.fixture(scope="module")
def cluster():
    before = shared_memory()
    with connect(num_cpus=3, object_store_mib=200):
        yield
    assert not left_since(before)


@pytest.fixture(
    scope="module", params=[FIRST, *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS)]
)
def made(request, tmp_path_factory, cluster):
    """Inputs of a kind of teacher."""
    folder = tmp_path_factory.mktemp(request.param)
    write_inputs(folder, request.param)
    return request.param, folder


def test_clips_are_prepared_by_a_pipelines_own_networks(cluster, tmp_path):
    """On Ray Data's actors; the empty caption is there even if no actor had anything to do."""
    pipeline = pipeline_cases.save(tmp_path / "pipeline", "wan21")
    clips = ["source.kind=sprites", f"source.path={tmp_path}/world", "source.num_clips=3"]
    clips += ["clip.num_frames=5", "clip.height=32", "clip.width=48"]
    by = [f"encode.codec={pipeline}", f"encode.text={pipeline}", "encode.text_length=12"]
    command = (f"output={tmp_path}/latents", *clips, *by)
    job_here("prepare", *command)
    store, encode = LatentStore(tmp_path / "latents"), PromptEncoder(pipeline, 12)
    assert [row.latents.shape for row in store] == [(16, 2, 4, 6)] * 3
    for row in store:
        assert torch.equal(torch.from_numpy(row.text.copy()), encode([row.caption])[0])
    assert torch.equal(null_of(store), encode([""])[0])
    (store.folder / NULL).unlink()
    with pytest.raises(MissingArtifact, match="empty caption for guidance"):
        null_of(store)
    job_here("prepare", *command)
    assert torch.equal(null_of(store), encode([""])[0])


def weights(run):
    """Every weight of a student."""
    files = sorted((run / "student").rglob("*.safetensors"))
    return {f"{path.name}/{n}": x for path in files for n, x in load_file(path).items()}


def require_sampler(folder, run, plan):
    """A student samples, by itself and by the teacher that it is compared with."""
    student = load_student(run / "student", folder / "pipeline")
    row = LatentStore(folder / "clips").row(0)
    text = torch.from_numpy(row.text.copy())[None]
    noise_at = keyed_noise(0, torch.tensor([0]))
    noise = noise_at(0, (1, *student.card.latent_shape))
    made = sample(student.fields, student.schedule, student.plan(plan), noise, text, noise_at=noise_at)
    assert made.isfinite().all()
    return student


def require_export(folder, run):
    """The trained student as a pipeline of diffusers, whose card has the run's figures, and as a bundle."""
    given = [f"student={run}/student", f"teacher={folder}/pipeline", f"codec={folder}/pipeline"]
    job_here("export", *given, f"pipeline={run}/pipeline", f"output={run}/bundle")
    card = (run / "pipeline" / "README.md").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| detail | 2 | feature_matching | 1 | {last['loss/feature_matching']:.4g} |" in card
    assert "| semantic | 2 | temporal_coherence | 1 | " in card
    assert verify_bundle(run / "bundle").text["kind"] == "WanPipeline"


def test_dcm_runs_and_is_taken_up_between_its_stages(made, monkeypatch):
    kind, folder = made
    distill = load_job("distill")
    command, run = settings(folder, kind, "dcm", "dcm"), folder / "dcm"
    stage = distill.run_stage

    def interrupted(config, name, *more):
        if name == "detail":
            raise KeyboardInterrupt
        return stage(config, name, *more)

    monkeypatch.setattr(distill, "run_stage", interrupted)
    monkeypatch.setattr("sys.argv", ["distill.py", *map(str, command)])
    with pytest.raises(KeyboardInterrupt):
        distill.main()
    assert not (run / "student").exists()
    said = job_here("distill", *command)
    assert "student: " in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["step"]) for one in lines] == [
        (stage, step) for stage in ("semantic", "detail") for step in (1, 2)
    ]
    judged = {"loss/adversarial", "loss/feature_matching", "loss/critic"} <= lines[-1].keys()
    assert judged == (kind not in UNETS)
    student = require_sampler(folder, run, "2+tail")
    last = run / "checkpoints" / "detail-step-000002"
    job_here("consolidate", f"checkpoint={last}", f"output={folder}/again/student")
    own, again = weights(run), weights(folder / "again")
    assert own.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in own.items())
    assert set(student.fields) == {"semantic", "detail", "teacher"}
    assert student.card.text == text_identity(LatentStore(folder / "clips"))
    assert student.card.text["kind"].endswith("Pipeline")
    if kind == "wan21":
        require_export(folder, run)


@pytest.mark.long
def test_mcm_runs_and_is_taken_up_within_its_stage(made):
    kind, folder = made
    if kind == "wan22":
        with pytest.raises(InvalidValue, match="two networks"):
            job_here("distill", *settings(folder, kind, "dcm", "mcm"), "experts=motion")
        return
    command, run = settings(folder, kind, "mcm", "mcm"), folder / "mcm"
    assert "student: " in job_here("distill", *command)
    require_sampler(folder, run, "2")
    if kind != "animatediff":
        return
    before = weights(run)
    for path in (run / "student", run / "checkpoints" / "motion-step-000002"):
        shutil.rmtree(path)
    job_here("distill", *command)
    after = weights(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(value.any() for name, value in after.items() if "lora_B" in name)
