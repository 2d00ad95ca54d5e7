"""The student of a checkpoint, on one machine: the run's own at its end, and any before."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_ranks
from job_cases import write_latents
from safetensors.torch import load_file

from raydistill.artifacts import LatentStore
from raydistill.config.distill import DistillConfig, EngineConfig, ScaleConfig
from raydistill.config.grid import GridConfig
from raydistill.config.stages import (
    DetailConfig,
    MotionConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SemanticConfig,
)
from raydistill.errors import CorruptArtifact, IncompatibleCheckpoint, InvalidValue, MissingArtifact
from raydistill.experts.checkpoint import TrainState
from raydistill.experts.launch import Worker
from raydistill.experts.plain_engine import rank_and_size
from raydistill.experts.result import Sample, consolidate, write_student
from raydistill.experts.worker import Run, settings_of, train
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.models.teacher import load_teacher
from raydistill.models.wan import build_tiny_teacher
from raydistill.sampler import keyed_noise, sample
from raydistill.student import load_student
from raydistill.types import Batch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
CODEC = ROOT / "raydistill" / "world" / "weights" / "codec"
STEPS = 2
SIZES = {"num_steps": STEPS, "global_batch": 2, "micro_batch": 1,
         "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0)}  # fmt: skip
JUDGED = ObjectiveConfig(adversarial=0.5)
ZERO_3 = EngineConfig(zero_stage=3, extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
RUNS = {
    "dual": {"engine": ZERO_3},
    "dual on a LoRA, in bf16": {"engine": EngineConfig(precision="bf16"), "semantic": {"lora_rank": 2}},
    "dual_full, the last weights": {"experts": "dual_full", "average_decay": 0.0},
    "motion": {"experts": "motion"},
}


def config_of(folder, name):
    """Settings of a run on two workers."""
    more = dict(RUNS[name])
    plain = ObjectiveConfig(motion=0.0)
    return DistillConfig(
        teacher=str(folder / "teacher"),
        codec=str(CODEC),
        data=str(folder / "latents"),
        output=str(folder / name),
        boundary=0.5,
        grid=GridConfig(num_intervals=10),
        semantic=SemanticConfig(**SIZES, **more.pop("semantic", {})),
        detail=DetailConfig(**SIZES, lora_rank=2, objective=JUDGED),
        motion=MotionConfig(**SIZES, lora_rank=2, objective=plain),
        scale=ScaleConfig(num_workers=2),
        save_every=1,
        keep=9,
        **more,
    )


def digests_of(config):
    store = LatentStore(config.data)
    found = {"teacher": teacher_digest(config.teacher), "codec": codec_digest(config.codec)}
    return found | {"latents": store.fingerprint}


def batches(worker, size):
    drawn = torch.Generator().manual_seed(worker.rank)
    for k in range(STEPS):
        x, text = (torch.randn(size, *shape, generator=drawn) for shape in ((4, 16, 4, 4), (8, 32)))
        yield Batch(torch.arange(size) + 2 * k + worker.rank, x, text)


def folder_of(config, stage, step=STEPS):
    return Path(config.output) / "checkpoints" / f"{stage}-step-{step:06d}"


def run_of(config):
    """Every stage on this rank, as Ray's workers would; no Ray."""
    rank, world_size = rank_and_size()
    Path(config.output).mkdir(exist_ok=True)
    example, semantic = (torch.zeros(1, 4, 16, 4, 4), torch.zeros(1, 8, 32)), None
    for name in config.stages:
        state = TrainState(
            stage=name, step=0, settings=settings_of(config, name, digests_of(config), semantic)
        )
        told = Run(config=config, batches=batches, example=example, semantic=semantic)
        place = {"run_dir": Path(config.output), "rank": rank, "world_size": world_size}
        how = {"device": torch.device("cpu"), "start_step": 0, "resume_from": None, "shard": None}
        train(Worker(config=told, state=state, **place, **how))
        semantic = folder_of(config, name)


def all_runs(folder):
    for name in RUNS:
        run_of(config_of(folder, name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    teacher = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    for p in teacher.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    teacher.network.save_pretrained(folder / "teacher", safe_serialization=True)
    write_latents(folder / "latents", codec_digest(CODEC), 2)
    run_ranks(all_runs, 2, folder)
    return folder


def files(folder):
    """Every weight of a student, bit for bit, and its card.

    Not the files' bytes: safetensors writes what it says beside the weights in no fixed order, and diffusers
    where a network was read from.
    """
    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, x in load_file(path).items():
            found[path.relative_to(folder).as_posix(), name] = (x.dtype, x.shape, x.numpy().tobytes())
    card = json.loads((folder / "student.json").read_text())
    return found | {name: card[name] for name in card.keys() - {"sha256", "checksum"}}


def consolidated(config, stage, output, step=STEPS):
    consolidate(folder_of(config, stage, step), config, LatentStore(config.data), output)
    return output


@pytest.mark.parametrize("name", RUNS)
def test_of_the_last_checkpoint_it_is_the_runs_own_student(runs, tmp_path, name):
    config = config_of(runs, name)
    done = tuple(folder_of(config, stage) for stage in config.stages)
    store = LatentStore(config.data)
    write_student(config, tmp_path / "own", Sample.of(store), digests_of(config), done)
    made = files(consolidated(config, config.stages[-1], tmp_path / "made"))
    assert made == files(tmp_path / "own")
    earlier = files(consolidated(config, config.stages[-1], tmp_path / "earlier", step=1))
    assert earlier.keys() == made.keys()
    assert earlier != made


@pytest.mark.parametrize("name", RUNS)
def test_its_weights_are_those_that_were_kept(runs, tmp_path, name):
    """Read from the checkpoint's files, by no code of ours."""
    config, stage = config_of(runs, name), config_of(runs, name).stages[-1]
    folder = folder_of(config, stage)
    if config.average_decay:
        part, kind = folder / "averages", "average/"
    else:
        part, kind = folder / "student", "weight/"
    files = list(part.iterdir())
    assert len(files) == 2
    parts = {n: x for file in files for n, x in load_file(file).items()}
    kept = {n.removeprefix(kind): x for n, x in parts.items() if n.startswith(kind)}
    output = consolidated(config, stage, tmp_path / "made")
    student = load_student(output, config.teacher, merged=False)
    last = student.fields["detail" if "detail" in config.stages else "semantic"]
    held = dict(last.named_parameters())
    assert len(kept) > 8
    assert all(torch.equal(held[n], x) for n, x in kept.items())


def test_of_two_experts_the_first_alone_is_finished_by_the_teacher(runs, tmp_path):
    config = config_of(runs, "dual")
    output = consolidated(config, "semantic", tmp_path / "made", step=1)
    student = load_student(output, config.teacher)
    assert student.kind == "single"
    assert set(student.plans) == {"1", "2+tail"}  # a single step goes all the way by the first expert
    noise_at = keyed_noise(0, torch.tensor([0]))
    text, noise = torch.zeros(1, 8, 32), noise_at(0, (1, *student.card.latent_shape))
    plan = student.plan("2+tail")
    assert sample(student.fields, student.schedule, plan, noise, text, noise_at=noise_at).isfinite().all()
    without = replace(config, sampling=replace(config.sampling, semantic_tail=(), num_steps=(2, 4)))
    with pytest.raises(InvalidValue, match="the teacher must finish"):
        consolidated(without, "semantic", tmp_path / "none")


def test_what_is_no_whole_checkpoint_is_refused(runs, tmp_path):
    config = config_of(runs, "dual")
    run = shutil.copytree(config.output, tmp_path / "run")
    moved = replace(config, output=str(run))
    with pytest.raises(MissingArtifact):
        consolidated(moved, "detail", tmp_path / "made", step=7)
    with pytest.raises(IncompatibleCheckpoint, match="grid"):
        consolidated(replace(moved, grid=GridConfig(num_intervals=9)), "detail", tmp_path / "made")
    with pytest.raises(IncompatibleCheckpoint, match="experts=motion has not"):
        consolidated(replace(moved, experts="motion"), "detail", tmp_path / "made")
    other = build_tiny_teacher(5, dim_head=12, num_heads=2, num_layers=2)
    other.network.save_pretrained(tmp_path / "other", safe_serialization=True)
    with pytest.raises(IncompatibleCheckpoint, match="teacher"):
        consolidated(replace(moved, teacher=str(tmp_path / "other")), "detail", tmp_path / "made")
    part = next((folder_of(moved, "detail") / "student").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact):
        consolidated(moved, "detail", tmp_path / "made")
    shutil.rmtree(folder_of(moved, "semantic"))
    with pytest.raises(MissingArtifact, match="copy it beside"):
        consolidated(moved, "detail", tmp_path / "made", step=1)
    assert not (tmp_path / "made").exists()


def test_a_stopped_one_leaves_nothing_and_a_torn_neighbour_is_passed_over(runs, tmp_path, monkeypatch):
    config = config_of(runs, "dual")
    run = shutil.copytree(config.output, tmp_path / "run")
    moved = replace(config, output=str(run))
    torn = run / "checkpoints" / "semantic-step-999999"
    torn.mkdir()
    (torn / "manifest.json").write_text("{")
    whole = files(consolidated(moved, "detail", tmp_path / "made"))
    assert whole == files(consolidated(config, "detail", tmp_path / "own"))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("raydistill.experts.result.save_student", stopped)
        with pytest.raises(KeyboardInterrupt):
            consolidated(moved, "detail", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "made", "own"}


def test_a_checkpoint_that_its_run_prunes_meanwhile_is_said_to_be_gone(runs, tmp_path, monkeypatch):
    config = config_of(runs, "dual")
    run = shutil.copytree(config.output, tmp_path / "run")
    moved = replace(config, output=str(run))

    def pruned(*given, **how):
        shutil.rmtree(folder_of(moved, "detail"))
        return load_teacher(*given, **how)

    monkeypatch.setattr("raydistill.experts.result.load_teacher", pruned)
    with pytest.raises(MissingArtifact, match="its run has newer ones now"):
        consolidated(moved, "detail", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_job_finds_what_lies_elsewhere(runs, tmp_path, monkeypatch, capsys):
    config = config_of(runs, "dual")
    run = shutil.copytree(config.output, tmp_path / "run")
    (tmp_path / "moved").mkdir()
    places = {
        name: shutil.copytree(runs / name, tmp_path / "moved" / name) for name in ("teacher", "latents")
    }
    settings = (run / "config.yaml").read_text().replace(str(runs), "/nowhere")
    (run / "config.yaml").write_text(settings)
    spec = importlib.util.spec_from_file_location("consolidate_job", ROOT / "jobs" / "consolidate.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    last = run / "checkpoints" / f"detail-step-{STEPS:06d}"
    command = ["consolidate.py", f"checkpoint={last}", f"output={tmp_path}/made"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(MissingArtifact) as missing:
        job.main()
    assert "data=" in str(missing.value.__notes__)
    here = [f"teacher={places['teacher']}", f"data={places['latents']}"]
    monkeypatch.setattr(sys, "argv", [*command, *here])
    job.main()
    assert f"of step {STEPS} of the detail stage" in capsys.readouterr().out
    assert json.loads((tmp_path / "made" / "student.json").read_text())["kind"] == "dual"
    assert files(tmp_path / "made") == files(consolidated(config, "detail", tmp_path / "again"))
    with pytest.raises(InvalidValue, match="new or an empty"):
        job.main()
    monkeypatch.setattr(sys, "argv", ["consolidate.py", f"checkpoint={run}", f"output={tmp_path}/x"])
    with pytest.raises(MissingArtifact):
        job.main()
