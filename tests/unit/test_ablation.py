"""Studies: what their settings must be, what counts as trained, how differences are decided."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from job_cases import ROOT, load_job

from raydistill.artifacts import fingerprint
from raydistill.config.ablate import AblateConfig, CompareConfig
from raydistill.config.load import load
from raydistill.errors import DistillError, InvalidValue, RaydistillError
from raydistill.evaluation import intervals
from raydistill.evaluation.measures import BY_NAME
from raydistill.evaluation.studies import decide
from raydistill.evaluation.summary import Row
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import point_to, write_artifact
from raydistill.student import CARD

TEACHERS = {"teacher": "teacher 50"}
STUDIES = sorted((ROOT / "jobs" / "tiny" / "ablation").glob("*.yaml"))


@pytest.fixture(scope="module")
def job():
    return load_job("ablate")


def study(**changed):
    fields = {
        "name": "toy",
        "question": "?",
        "base": str(ROOT / "jobs/tiny/single.yaml"),
        "output": "runs/toy",
        "trainings": "runs/trainings",
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
    assert {one.measure for one in config.compare} | set(config.columns) <= set(BY_NAME)


def test_a_typo_in_one_variant_is_found_before_any_training(job):
    with pytest.raises(RaydistillError, match=r"boundry.*boundary") as caught:
        job.check(study(variants={"a": [], "b": ["boundry=0.6"]}))
    assert "variant b" in caught.value.__notes__


UNMEASURED = {
    "columns": {"columns": ["frechet", "sharpnes"]},
    "compare": {"compare": [CompareConfig(left="a", right="b", num_steps=3)]},
    "compare ": {"compare": [CompareConfig(left="a", right="b", measure="sharpnes")]},
    "compare  ": {"compare": [CompareConfig(left="a", right="teacher_0")]},
    "teacher_steps": {
        "compare": [CompareConfig(left="a", right="teacher")],
        "evaluate_shared": ["teacher_steps=[]"],
    },
}


@pytest.mark.parametrize("key", UNMEASURED)
def test_what_will_not_be_measured_is_refused_before_any_training(key, job):
    config = study(**UNMEASURED[key])
    with pytest.raises(InvalidValue) as caught:
        job.require_measured(config, job.measurement(config))
    assert caught.value.key == key.strip()


REFUSED = {
    "name": {"name": "Toy study"},
    "variants": {"variants": {}},
    "variants.b": {"variants": {"b": ["output=elsewhere"]}},
    "seeds": {"seeds": (7, 7)},
    "compare": {"compare": [CompareConfig(left="a", right="c")]},
    "compare ": {"compare": [CompareConfig(left="b", right="b")]},
    "parallel": {"parallel": 0},
    "before": {"before": ["rm -r runs"]},
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_settings(key):
    with pytest.raises(InvalidValue) as caught:
        study(**REFUSED[key])
    assert caught.value.key == key.strip()


def test_what_a_training_says_last_is_told_now_and_then(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "SECONDS_BETWEEN_LINES", 0.05)
    talk = (
        "import time\nfor k in range(3): print('step', k, flush=True); time.sleep(0.4)\nraise SystemExit(3)"
    )
    assert job.run_logged([sys.executable, "-c", talk], tmp_path / "log", "a, seed 7") == 3
    assert capsys.readouterr().out.splitlines() == [f"a, seed 7: step {k}" for k in range(3)]
    assert (tmp_path / "log").read_text() == "step 0\nstep 1\nstep 2\n"


def test_inputs_are_made_in_turn_and_the_first_that_fails_stops_the_study(job, monkeypatch, capfd):
    config = study(before=["jobs/prepare.py --config 'a b.yaml'", "jobs/nothing.py"])
    monkeypatch.setattr(job.sys, "executable", "echo")
    job.make_inputs(config)
    said = capfd.readouterr().out.splitlines()
    assert "python jobs/prepare.py --config 'a b.yaml'" in said
    assert f"{ROOT}/jobs/prepare.py --config a b.yaml" in said
    monkeypatch.setattr(job.sys, "executable", "false")
    with pytest.raises(DistillError, match=r"prepare\.py ended with exit status 1"):
        job.make_inputs(config)


def make_latents(folder, value):
    """An artifact of one row."""
    row = latent_row(np.full((1, 1, 1, 1), value, np.float32), np.zeros((1, 1), np.float32), "a", "0")
    shard = write_shard(folder / "x", "part-0", [row], {}, order=0, rows_per_group=1)
    write_artifact(folder / "x", [shard], {})
    point_to(folder, "x", fingerprint({}))
    return str(folder)


@pytest.fixture
def inputs(tmp_path):
    """A teacher and latents, as far as can be seen from outside."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "weights").write_text("first")
    make_latents(tmp_path / "data", 0)
    return [f"teacher={tmp_path}/teacher", f"data={tmp_path}/data"]


def test_a_training_is_kept_as_long_as_it_is_the_one_asked_for(job, tmp_path, inputs, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = study(trainings=str(tmp_path / "trainings"), shared=inputs, seeds=(7, 8))
    folder = job.run_folder(config, "b", 7)
    (folder / "student").mkdir(parents=True)
    assert not job.is_trained(config, "b", 7)  # stopped while the student was written: its card is the last
    (folder / "student" / CARD).write_text("{}")
    assert job.is_trained(config, "b", 7)
    assert job.train_one(config, "b", 7) == "b, seed 7: trained meanwhile"  # by another study
    assert not job.is_trained(config, "b", 8)
    assert not job.is_trained(config, "a", 7)
    assert not job.is_trained(replace(config, shared=[*inputs, "average_decay=0.9"]), "b", 7)
    assert job.is_trained(replace(config, shared=[*inputs, "boundary=0.9"]), "b", 7)  # b has its own
    assert job.command_of(config, "b", 7)[-3:] == ["boundary=0.6", "seed=7", f"output={folder}"]


def test_another_teacher_or_other_data_in_the_same_place_are_another_training(
    job, tmp_path, inputs, monkeypatch
):
    monkeypatch.chdir(ROOT)
    config = study(shared=inputs)
    first = job.run_folder(config, "b", 7)
    (tmp_path / "teacher" / "weights").write_text("second")
    assert job.run_folder(config, "b", 7) != first
    (tmp_path / "teacher" / "weights").write_text("first")
    assert job.run_folder(config, "b", 7) == first
    make_latents(tmp_path / "data", 1)
    assert job.run_folder(config, "b", 7) != first


def test_studies_share_a_training_that_both_ask_for_and_no_other(job, inputs, monkeypatch):
    monkeypatch.chdir(ROOT)
    one = study(shared=inputs, variants={"a": ["boundary=0.6"], "b": ["boundary=0.7"]})
    other = study(name="other", output="runs/other", shared=[*inputs, "boundary=0.6"], variants={"same": []})
    assert job.run_folder(one, "a", 7) == job.run_folder(other, "same", 7)
    folders = {job.run_folder(one, variant, seed) for variant in "ab" for seed in (7, 8)}
    assert len(folders) == 4
    measured = [job.evaluation(config) for config in (one, other)]
    assert measured[0].students["a"] == measured[1].students["same"]
    assert measured[0].records == measured[1].records
    assert measured[0].output != measured[1].output


def test_the_page_shows_question_variants_table_and_the_pictures_there_are(job):
    more = {"command": "python jobs/ablate.py", "commit": "abc", "seeds": [7], "machine": "one"}
    more["trained_at"] = ["abb", "abc"]
    text = job.page(study(), "| sampler |", more, ["strips"])
    for part in (
        "# toy",
        "\n?\n",
        "* `a`: `(the base)`",
        "* `b`: `boundary=0.6`",
        "| sampler |",
        "at abc",
        "at abb, abc",
    ):
        assert part in text
    assert "![strips](strips.png)" in text
    assert "losses" not in text


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
    (verdict,) = decide(rows, [CompareConfig(left="a", right="b", measure=measure)], TEACHERS)
    assert verdict.outcome == outcome
    assert verdict.reason == "3 training seeds"


def test_figures_of_one_student_are_said_to_be_so_and_shares_are_in_points():
    rows = {}
    for label, value in (("a 4", 0.9), ("b 4", 0.8)):
        three = row(label, value, "right/all")
        rows[label] = replace(three, figures={k: replace(v, num_seeds=1) for k, v in three.figures.items()})
    (verdict,) = decide(rows, [CompareConfig(left="a", right="b")], TEACHERS)
    assert verdict.reason == "one training seed: its own spread is not in it"
    assert "a 4: all right %, less b 4's: 10 [" in verdict.text
    assert "] points (more than 0 points" in verdict.text


@pytest.mark.parametrize(("measure", "better"), [("right/all", 1), ("watermark", -1)])
@pytest.mark.parametrize(("worse", "outcome"), [(0.005, "held"), (0.1, "not held"), (0.02, "undecided")])
def test_as_good_but_for_a_margin(measure, better, worse, outcome):
    rows = {"a 4": row("a 4", 0.5 - better * worse, measure, 0.003), "b 4": row("b 4", 0.5, measure, 0.006)}
    margin = 0.02 * BY_NAME[measure].scale
    asked = CompareConfig(left="a", right="b", measure=measure, margin=margin)
    (verdict,) = decide(rows, [asked], TEACHERS)
    assert (verdict.outcome, abs(verdict.limit)) == (outcome, margin)


def test_what_is_not_apart_is_undecided_and_what_is_absent_is_said():
    rows = {"a 4": row("a 4", 0.8, "right/all", 0.05), "b 4": row("b 4", 0.8, "right/all", 0.02)}
    (verdict,) = decide(rows, [CompareConfig(left="a", right="b")], TEACHERS)
    assert verdict.outcome == "undecided"
    rows = {f"{name} 4": row(f"{name} 4", 0.0, "black_clip", 0.0) for name in "ab"}
    (never,) = decide(rows, [CompareConfig(left="a", right="b", measure="black_clip")], TEACHERS)
    assert never.outcome == "undecided"  # neither was seen: no clip of 100 is not no clip
    stranger = CompareConfig(left="a", right="teacher_0", measure="black_clip")
    rows["teacher_0 50"] = row("teacher_0 50", 0.5, "black_clip", 0.01)
    (own,) = decide(rows, [stranger], TEACHERS | {"teacher_0": "teacher_0 50"})
    assert (own.outcome, own.reason) == ("held", "3 training seeds")
    (gone,) = decide(rows, [CompareConfig(left="a", right="teacher")], TEACHERS)
    assert gone.outcome == "skipped"
    assert "teacher 50 not measured" in gone.reason
