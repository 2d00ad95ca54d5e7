"""A small study from settings to its page: what is trained, kept, refused and published."""

import json
import sys

import pytest
from job_cases import job, load_job, write_latents

from raydistill.artifacts import tree_digest
from raydistill.config.load import run
from raydistill.models.codec import build_tiny_codec
from raydistill.models.wan import build_tiny_teacher

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Untrained networks, latents of 8 clips, a study with two variants, and its first run."""
    folder = tmp_path_factory.mktemp("study")
    teacher = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=1)
    teacher.transformer.save_pretrained(folder / "teacher")
    build_tiny_codec(0, width=8).save(folder / "codec")
    write_latents(folder / "latents", tree_digest(folder / "codec"), 8)
    networks = {"teacher": f"{folder}/teacher", "codec": f"{folder}/codec"}
    stage = {"num_steps": 2, "global_batch": 4, "micro_batch": 4, "optimizer": {"warmup_steps": 1}}
    base = {"experts": "single", "data": f"{folder}/latents", "semantic": stage, "report_every": 1}
    base |= {"scale": {"num_workers": 1}, "engine": {"backend": "torch"}, "grid": {"num_intervals": 8}}
    measured = {"judge": "none", "threads": 1, "num_clips": 8, "reference_clips": 8, "num_draws": 20}
    measured |= {"teacher_steps": [4], "student_steps": [2], "students": {"dual": ["nobody"]}}
    study = {
        "name": "toy",
        "question": "Does a small width of the bowl help?",
        "base": f"{folder}/base.yaml",
        "evaluate": f"{folder}/evaluate.yaml",
        "variants": {"wide": [], "narrow": ["semantic.objective.huber_c=0.001"]},
        "seeds": [7],
        "parallel": 2,
        "columns": ["frechet", "sharpness", "watermark"],
        "compare": [
            {"left": "narrow", "right": "wide", "measure": "sharpness", "num_steps": 2},
            {"left": "narrow", "right": "teacher", "measure": "watermark", "num_steps": 2},
        ],
        "output": f"{folder}/runs",
        "trainings": f"{folder}/trainings",
    }
    for name, settings in {"base": networks | base, "evaluate": networks | measured, "toy": study}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    said = job("ablate", "--config", f"{folder}/toy.yaml")
    assert "2 trainings, 0 done before" in said
    return folder


@pytest.fixture(scope="module")
def ablate():
    """The job, in this process."""
    return load_job("ablate")


@pytest.fixture
def again(made, ablate, monkeypatch, capsys):
    """Runs the study again, in its own folder; gives exit status, stdout and stderr."""

    def run_again(*more):
        monkeypatch.chdir(made)
        monkeypatch.setattr(sys, "argv", ["ablate.py", "--config", f"{made}/toy.yaml", *more])
        status = 0
        try:
            run(ablate.main)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_again


def test_every_variant_is_measured_beside_the_teacher_and_the_others(made):
    results = json.loads((made / "runs/evaluation/results.json").read_text())
    assert [row["label"] for row in results["rows"]] == ["teacher 4", "wide 2", "narrow 2"]
    settings = results["settings"]
    assert settings["command"].endswith("toy.yaml")
    assert (settings["seeds"], settings["variants"]["wide"]) == ([7], "(the base)")
    assert settings["commit"]
    claims = [one["claim"] for one in results["verdicts"]]
    assert claims == [
        "narrow 2: distance of sharpness from 1, less wide 2's",
        "narrow 2: watermark, less teacher 4's",
    ]
    assert all(one["figure"]["low"] <= one["figure"]["high"] for one in results["verdicts"])
    drawn = {path.name for path in (made / "runs/evaluation/report").iterdir()}
    assert {"losses.png", "strips.png", "quality.png", "study.md", "table.md"} <= drawn
    assert (made / "runs/evaluation/report.html").is_file()


def test_the_same_command_trains_nothing_again_and_publishes(made, again):
    kept = {path: path.stat().st_mtime_ns for path in (made / "trainings").glob("*-7/metrics.jsonl")}
    assert len(kept) == 2
    status, out, err = again("--update-docs")
    assert status == 0, err
    assert "2 trainings, 2 done before" in out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    page = (made / "docs/ablation/toy/README.md").read_text()
    assert page.startswith("# toy\n\nDoes a small width of the bowl help?\n\n* `wide`: `(the base)`\n")
    assert "| narrow 2 | 2 |" in page
    assert "one training seed: its own spread is not in it" in page
    for name in ("quality", "strips", "losses"):
        assert f"![{name}]({name}.png)" in page
        assert (made / f"docs/ablation/toy/{name}.png").is_file()


def test_students_of_other_settings_are_not_shown(again):
    status, out, err = again("--no-training", "shared=[average_decay=0.5]")
    assert status == 0, err
    assert "skipped wide" in out
    assert "| wide 2" not in out


def test_a_failed_training_is_named_with_its_last_words_and_no_other_is_begun(again, tmp_path):
    broken = "shared=[semantic.objective.temporal_coherence=1,semantic.objective.coherence_stride=99]"
    status, _, err = again(f"trainings={tmp_path}", "parallel=1", broken)
    assert status == 1
    assert "wide, seed 7: exit status 2: InvalidValue: semantic.objective.coherence_stride" in err
    (begun,) = tmp_path.iterdir()
    assert not (begun / "student").exists()
