"""Studies: what their settings must be, what counts as trained, how differences are decided."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from raydistill.config.ablate import AblateConfig, CompareConfig
from raydistill.config.load import load
from raydistill.errors import InvalidValue, RaydistillError
from raydistill.evaluation import intervals
from raydistill.evaluation.measures import BY_NAME
from raydistill.evaluation.studies import decide
from raydistill.evaluation.summary import Row

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "jobs" / "tiny" / "ablation").glob("*.yaml"))


@pytest.fixture(scope="module")
def job():
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        spec = importlib.util.spec_from_file_location("ablate_job", ROOT / "jobs" / "ablate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "jobs"))
    return module


def study(**changed):
    fields = {
        "name": "toy",
        "question": "?",
        "base": str(ROOT / "jobs/tiny/single.yaml"),
        "output": "runs/toy",
    }
    fields |= {
        "evaluate": str(ROOT / "jobs/tiny/evaluate.yaml"),
        "variants": {"a": [], "b": ["boundary=0.6"]},
    }
    return AblateConfig(**{**fields, **changed})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_asks_for_runs_that_there_are(path, job, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(AblateConfig, path)
    job.check(config)
    assert path.stem == config.name
    assert len(config.seeds) >= 3
    assert config.compare
    asked = job.evaluation(config)
    assert set(asked.students) == set(config.variants)
    assert {one.measure for one in config.compare} | set(config.columns) <= set(BY_NAME)


def test_a_typo_in_one_variant_is_found_before_any_training(job):
    with pytest.raises(RaydistillError, match=r"boundry.*boundary"):
        job.check(study(variants={"a": [], "b": ["boundry=0.6"]}))


REFUSED = {
    "name": {"name": "Toy study"},
    "variants": {"variants": {}},
    "variants.b": {"variants": {"b": ["output=elsewhere"]}},
    "seeds": {"seeds": (7, 7)},
    "compare": {"compare": [CompareConfig(left="a", right="c")]},
    "parallel": {"parallel": 0},
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_settings(key):
    with pytest.raises(InvalidValue) as caught:
        study(**REFUSED[key])
    assert caught.value.key == key


def test_a_training_is_kept_as_long_as_it_is_the_one_asked_for(job, tmp_path):
    config = study(output=str(tmp_path))
    folder = job.run_folder(config, "b", 7)
    (folder / "student").mkdir(parents=True)
    assert not job.is_trained(config, "b", 7)
    (folder / "student" / "student.json").write_text("{}")
    (folder / "trained.json").write_text(json.dumps({"identity": job.identity_of(config, "b", 7)}))
    assert job.is_trained(config, "b", 7)
    assert not job.is_trained(study(output=str(tmp_path), shared=["average_decay=0.9"]), "b", 7)
    assert not job.is_trained(config, "b", 8)
    assert job.command_of(config, "b", 7)[-3:] == ["boundary=0.6", "seed=7", f"output={folder}"]


def row(label, value, measure, spread=0.01):
    rng = np.random.default_rng(0)
    draws = value + spread * rng.standard_normal(400)
    return Row(label, label, 4, 4, 0.0, (), {measure: intervals.Bootstrapped(value, draws, 100, 3)})


@pytest.mark.parametrize(
    ("measure", "left", "right", "outcome"),
    [
        ("right/all", 0.9, 0.8, "held"),
        ("right/all", 0.8, 0.9, "not held"),
        ("watermark", 0.1, 0.8, "held"),
        ("sharpness", 1.1, 0.4, "held"),  # nearer to 1, from the other side
        ("sharpness", 1.8, 0.9, "not held"),
    ],
)
def test_a_difference_is_decided_by_the_measures_own_better(measure, left, right, outcome):
    rows = {"a 4": row("a 4", left, measure), "b 4": row("b 4", right, measure)}
    (verdict,) = decide(rows, [CompareConfig(left="a", right="b", measure=measure)], "teacher 50")
    assert verdict.outcome == outcome
    assert verdict.reason == "3 training seeds"


def test_what_is_not_apart_is_undecided_and_what_is_absent_is_said():
    rows = {"a 4": row("a 4", 0.8, "right/all", 0.05), "b 4": row("b 4", 0.8, "right/all", 0.02)}
    (verdict,) = decide(rows, [CompareConfig(left="a", right="b")], "teacher 50")
    assert verdict.outcome == "undecided"
    (gone,) = decide(rows, [CompareConfig(left="a", right="teacher")], "teacher 50")
    assert gone.outcome == "skipped"
    assert "teacher 50 not measured" in gone.reason
