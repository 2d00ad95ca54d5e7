"""The export: what it takes along, what it leaves out and refuses, and what is left when it is stopped."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from bundle_cases import CODEC, export_again, save_untrained_bundle, save_untrained_student, sources_of
from evaluate_cases import NULL_TEXT
from job_cases import load_job

from raydistill.artifacts import fingerprint
from raydistill.config.evaluate import EvaluateConfig, LatencyConfig, PicturesConfig
from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, MissingValue, StaleArtifact
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import build_lineup
from raydistill.service import export
from raydistill.service.bundle import CARD, read_bundle, verify_bundle
from raydistill.service.export import export_bundle
from raydistill.service.scores import read_scores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return folder/tiny, beside it folder/tiny-made with its student and teacher."""
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(made, tmp_path):
    """Copy the bundle, to be damaged."""
    return shutil.copytree(made, tmp_path / "tiny")


def test_plans_with_the_teachers_tail_need_the_teacher(made, tmp_path):
    without = export_again(made, tmp_path / "without", teacher=None)
    assert list(without.card.plans) == ["1", "2", "4", "8"]
    assert without.left_out == ("plan 2+tail: it needs the teacher, and none was given: teacher=FOLDER",)
    assert not (tmp_path / "without" / "teacher").exists()
    assert export_again(made, tmp_path / "with").left_out == ()
    assert (tmp_path / "with" / "teacher" / "config.json").is_file()
    with pytest.raises(InvalidValue, match=r"one of 1, 2, 4, 8; .* need teacher=FOLDER"):
        export_again(made, tmp_path / "no", teacher=None, default_plan="2+tail")
    with pytest.raises(StaleArtifact, match="another teacher"):
        export_again(made, tmp_path / "no", teacher=sources_of(made)[0] / "semantic")
    with pytest.raises(StaleArtifact, match="another codec"):
        export_bundle(sources_of(made)[0], CODEC.parent / "hard" / "codec", tmp_path / "no", name="no", fps=8)


def test_a_teacher_that_no_plan_needs_is_not_copied(tmp_path):
    student = save_untrained_student(tmp_path, "single")
    done = export_bundle(student, CODEC, tmp_path / "b", name="b", fps=8, teacher=tmp_path / "teacher")
    assert done.left_out == (f"teacher {tmp_path / 'teacher'}: no plan needs it",)
    assert not done.card.has_teacher


def test_a_student_that_is_nothing_without_its_teacher_is_refused_without(tmp_path):
    motion = save_untrained_student(tmp_path / "motion", "motion")
    dual = save_untrained_student(tmp_path / "dual")
    values = json.loads((dual / "student.json").read_text())
    del values["checksum"]
    values["plans"] = {"2+tail": values["plans"]["2+tail"]}
    (dual / "student.json").write_text(json.dumps({**values, "checksum": fingerprint(values)}))
    for student, says in ((motion, "LoRA on its teacher"), (dual, "every plan")):
        with pytest.raises(MissingValue, match=says) as refused:
            export_bundle(student, CODEC, tmp_path / "b", name="b", fps=8)
        assert refused.value.key == "teacher"
    assert not (tmp_path / "b").exists()
    given = {"name": "b", "fps": 8, "teacher": tmp_path / "dual" / "teacher"}
    assert export_bundle(dual, CODEC, tmp_path / "b", **given).card.default_plan == "2+tail"


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((18, 32, 32), "patches of"),
        ((16, 24, 32), "patches of"),
        ((16, 36, 32), "multiples of 8"),
        ((16, 0, 32), "at least 1"),
        ((16, 32), "frames, height and width"),
        ((512, 32, 32), "64 positions"),
    ],
)
def test_sizes_that_cannot_be_made_are_not_exported(made, tmp_path, size, says):
    with pytest.raises(InvalidValue, match=says) as refused:
        export_again(made, tmp_path / "more", sizes=[size])
    assert refused.value.key == "sizes"
    assert not (tmp_path / "more").exists()


def stop_at(number, how, monkeypatch):
    """Have the copy of the file of this number end otherwise, half-written."""
    copied, real = [], export.copy_durably

    def copy(source, target):
        copied.append(target)
        if len(copied) == number:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes()[:10])
            how()
        real(source, target)

    monkeypatch.setattr(export, "copy_durably", copy)


def interrupt():
    raise KeyboardInterrupt


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", [1, 8])
def test_a_stopped_export_leaves_nothing(made, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patched:
        stop_at(number, interrupt, patched)
        with pytest.raises(KeyboardInterrupt):
            export_again(made, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    assert export_again(made, tmp_path / "b").written
    assert verify_bundle(tmp_path / "b").digest == read_bundle(made).digest


def test_what_a_killed_export_leaves_is_no_bundle_and_goes_with_the_next(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(5, die, patched)
        killed = multiprocessing.get_context("fork").Process(target=export_again, args=(made, tmp_path / "b"))
        killed.start()
        killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    for folder in (left, tmp_path / "b"):
        with pytest.raises(MissingArtifact):
            read_bundle(folder)
    assert export_again(made, tmp_path / "b").written
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_a_source_that_changes_while_it_is_copied_is_noticed(made, tmp_path, monkeypatch):
    real = export.copy_durably

    def copy(source, target):
        real(source, target)
        if target.name == "detail.safetensors":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(export, "copy_durably", copy)
    with pytest.raises(CorruptArtifact, match=r"changed: student/detail\.safetensors"):
        export_again(made, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_same_export_again_does_nothing_and_another_is_refused(made, bundle):
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    again = export_again(made, bundle)
    assert (again.written, again.card) == (False, read_bundle(made))
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    for changes in ({"fps": 9}, {"teacher": None}, {"default_plan": "2"}):
        with pytest.raises(InvalidValue, match=r"another bundle is there, tiny@.*: delete it") as refused:
            export_again(made, bundle, **changes)
        assert refused.value.key == "output"
    (bundle / "codec" / "latents.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"missing: codec/latents\.json"):
        export_again(made, bundle)
    (bundle / CARD).unlink()
    with pytest.raises(InvalidValue, match="something else is there"):
        export_again(made, bundle)


@pytest.fixture(scope="module")
def evaluation(made, tmp_path_factory):
    """Run a real evaluation of the student, on four clips."""
    student, teacher = sources_of(made)
    config = EvaluateConfig(
        teacher=str(teacher),
        codec=str(CODEC),
        judge="",
        students={"mine": [str(student)]},
        output=str(tmp_path_factory.mktemp("evaluation")),
        num_clips=4,
        reference_clips=8,
        teacher_steps=(2,),
        student_steps=(2, 4),
        semantic_tail=(2,),
        head_detail=(2,),
        paths=("stored", "renoise"),
        num_draws=20,
        threads=1,
        latency=LatencyConfig(rounds=0),
        pictures=PicturesConfig(captions=1, strip_captions=1),
    )
    build_report(config, load_job("evaluate").make_setting(config), build_lineup(config, NULL_TEXT))
    return Path(config.output)


def test_scores_are_those_of_the_same_student_and_plan(made, evaluation, tmp_path):
    card = export_again(made, tmp_path / "b", scores=evaluation).card
    assert read_bundle(tmp_path / "b").scores == card.scores
    rows = {row["label"]: row for row in json.loads((evaluation / "results.json").read_text())["rows"]}
    assert {"mine 2", "mine 2 renoise", "mine: head + detail 2"} <= set(rows)
    labels = {"2": "mine 2", "4": "mine 4", "2+tail": "mine: semantic 2 + tail"}
    assert set(card.scores) == set(labels)
    for plan, label in labels.items():
        scores, figures = card.scores[plan], rows[label]["figures"]
        assert (scores["num_clips"], scores["num_seeds"]) == (4, 1)
        assert set(scores["figures"]) == set(figures) >= {"frechet", "path/direction"}
        frechet = figures["frechet"]
        assert scores["figures"]["frechet"] == {part: frechet[part] for part in ("value", "low", "high")}


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        ("mine: head + detail 2", {}),
        ("mine: semantic 2 + tail", {"guidance_scale": 3.0}),
        ("mine: semantic 2 + tail", {"teacher": None}),
    ],
)
def test_scores_of_a_tail_are_not_those_of_a_head_or_at_another_guidance(
    made, evaluation, tmp_path, label, changes
):
    """Even where the times are the same, as on a coarse grid."""
    results = json.loads((evaluation / "results.json").read_text())
    (row,) = (row for row in results["rows"] if row["label"] == "mine: semantic 2 + tail")
    weights = results["settings"]["weights"]
    weights[label] = {k: v for k, v in {**weights[row["label"]], **changes}.items() if v is not None}
    row["label"] = label
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = read_bundle(made)
    assert set(read_scores(tmp_path, card.sources, card.plans, 2.0)) == {"2", "4"}
    assert set(read_scores(evaluation, card.sources, card.plans, 2.0)) == {"2", "4", "2+tail"}


def test_scores_of_another_student_are_refused(made, evaluation, tmp_path):
    other = save_untrained_student(tmp_path / "other", seed=9)
    given = {"name": "b", "fps": 8}
    with pytest.raises(StaleArtifact, match="did not measure this student"):
        export_bundle(other, CODEC, tmp_path / "b", scores=evaluation, **given)
    results = json.loads((evaluation / "results.json").read_text())
    results["rows"] = [row for row in results["rows"] if row["label"] == "mine 2 renoise"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(StaleArtifact, match="did not measure a plan"):
        export_again(made, tmp_path / "b", scores=tmp_path)
    for text, error in (
        ("{", CorruptArtifact),
        ('{"version": 2}', StaleArtifact),
        ('{"version": 1}', StaleArtifact),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(error, match="evaluate again"):
            export_again(made, tmp_path / "b", scores=tmp_path)
    with pytest.raises(MissingArtifact, match="output folder of"):
        export_again(made, tmp_path / "b", scores=tmp_path / "other")
    assert not (tmp_path / "b").exists()


def test_names_are_fit_for_addresses(made, tmp_path):
    for name in ("", "a/b", "..", "a b", "x" * 65, "\u00e9"):
        with pytest.raises(InvalidValue) as refused:
            export_again(made, tmp_path / "b", name=name)
        assert refused.value.key == "name"
    for given, name in (
        (["output=a/b"], "b"),
        (["output=a/bundle"], "a"),
        (["output=a/b", "name=c.1"], "c.1"),
    ):
        assert from_command_line(ExportConfig, ["student=s", *given])[0].bundle_name == name
    with pytest.raises(InvalidValue, match="at least 1"):
        from_command_line(ExportConfig, ["student=s", "output=a/b", "sizes=[[16,32]]"])


def test_the_teacher_itself_can_be_a_plan_beside_the_students(made, tmp_path):
    bundle = export_again(made, tmp_path / "with", teacher_steps=[3, 50]).card
    assert {"teacher3", "teacher50"} < set(bundle.plans)
    plan = bundle.plans["teacher3"]
    assert (plan.num_steps, plan.passes, plan.experts) == (3, 6, ("teacher",))
    without = export_again(made, tmp_path / "without", teacher=None, teacher_steps=[3])
    assert "plan teacher3: it needs the teacher, and none was given: teacher=FOLDER" in without.left_out
    with pytest.raises(MissingValue, match="teacher must be given"):
        ExportConfig(student="s", output="o", teacher_steps=(3,))


def test_the_job_says_what_it_wrote_and_what_it_left_out(made, tmp_path, monkeypatch, capsys):
    student, _ = sources_of(made)
    arguments = [f"student={student}", f"codec={CODEC}", f"output={tmp_path}/b", "sizes=[[32,32,32]]"]
    monkeypatch.setattr("sys.argv", ["export.py", *arguments])
    job = load_job("export")
    job.main()
    said = capsys.readouterr().out
    card = read_bundle(tmp_path / "b")
    for part in (
        f"b: b@{card.digest[:12]}, ",
        "  plan 4: steps 4, passes 4, semantic + detail (default)\n",
        "  size 32x32 with 32 frames, 4 s\n",
        "  left out: plan 2+tail: it needs the teacher",
        f"  digest {card.digest}\n",
    ):
        assert part in said
    job.main()
    assert "MB, was there already\n" in capsys.readouterr().out
