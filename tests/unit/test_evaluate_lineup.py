"""Who takes part in an evaluation: which students are refused, skipped, or followed on which path."""

import dataclasses
from types import SimpleNamespace

import pytest
from evaluate_cases import NULL_TEXT, SMALL, make_config, make_student, make_weights

from raydistill.artifacts import tree_digest
from raydistill.errors import StaleArtifact
from raydistill.evaluation.candidates import build_lineup
from raydistill.evaluation.run import Bench
from raydistill.models.wan import build_tiny_teacher
from raydistill.student import load_student


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights")
    make_weights(weights)
    return make_config(weights, tmp_path_factory.mktemp("output"))


@pytest.mark.parametrize("source", ["teacher", "codec"])
def test_a_student_of_other_networks_is_refused(config, tmp_path, source):
    stranger = make_student(tmp_path / "stranger", "dual", 1, sources={source: "0" * 64})
    with pytest.raises(StaleArtifact, match=f"another {source}"):
        build_lineup(dataclasses.replace(config, students={"dual": [stranger]}), NULL_TEXT)


def test_students_of_several_teachers_stand_each_beside_its_own(config, tmp_path, monkeypatch):
    other = build_tiny_teacher(7, **SMALL).transformer
    other.save_pretrained(tmp_path / "poor")
    digests = [tree_digest(folder) for folder in (config.teacher, tmp_path / "poor")]
    students = {
        kind: [make_student(tmp_path / kind, "single", 1, sources={"teacher": digest})]
        for kind, digest in zip(("clean", "field"), digests, strict=True)
    }
    asked = dataclasses.replace(
        config, students=students, more_teachers={"teacher_poor": f"{tmp_path}/poor"}, student_steps=(2,)
    )
    lineup = build_lineup(asked, NULL_TEXT)
    found = [(one.label, one.teacher) for one in lineup.candidates]
    assert found == [
        ("teacher 3", "teacher"),
        ("teacher 1", "teacher"),
        ("teacher_poor 3", "teacher_poor"),
        ("teacher_poor 1", "teacher_poor"),
        ("clean 2", "teacher"),
        ("field 2", "teacher_poor"),
    ]
    assert {name: one.label for name, one in lineup.anchors.items()} == {
        "teacher": "teacher 3",
        "teacher_poor": "teacher_poor 3",
    }
    assert lineup.anchor is lineup.candidates[0]
    weights = [one.weights["teacher"] for one in lineup.anchors.values()]
    assert weights == digests

    def noted(_bench, candidate, anchor, _title):
        beside[candidate.label] = anchor and anchor.latents
        return SimpleNamespace(latents=f"clips of {candidate.label}")

    beside = {}
    monkeypatch.setattr(Bench, "_record", noted)
    Bench(SimpleNamespace(batch_size=4, codec=None), None).run(lineup)
    assert beside == {
        "teacher 3": None,
        "teacher_poor 3": None,
        "teacher 1": "clips of teacher 3",
        "teacher_poor 1": "clips of teacher_poor 3",
        "clean 2": "clips of teacher 3",
        "field 2": "clips of teacher_poor 3",
    }


@pytest.mark.parametrize("name", ["guidance_scale", "shift"])
def test_a_student_of_another_path_of_the_teacher_is_refused(config, name):
    with pytest.raises(StaleArtifact, match=f"set {name}="):
        build_lineup(dataclasses.replace(config, **{name: 3.0}), NULL_TEXT)


def test_steps_a_student_cannot_do_are_skipped_and_another_path_has_its_own_rows(config):
    asked = dataclasses.replace(config, student_steps=(7, 2), paths=("stored", "renoise"))
    lineup = build_lineup(asked, NULL_TEXT)
    assert [one.what for one in lineup.skipped if "dual" in one.what] == ["dual 7", "dual 7 renoise"]
    plans = {one.label: one.plan.path for one in lineup.candidates if one.group.startswith("single")}
    assert plans == {"single 2": "deterministic", "single 2 renoise": "renoise"}


@pytest.mark.parametrize("kinds", [("dual",), ("wide", "narrow"), ()])
def test_the_usual_kinds_are_missed_only_where_no_others_were_asked_for(config, kinds):
    students = dict.fromkeys(kinds, config.students["dual"][:1])
    lineup = build_lineup(dataclasses.replace(config, students=students), NULL_TEXT)
    missed = {one.what for one in lineup.skipped} & {"dual", "single"}
    assert missed == {("dual",): {"single"}, ("wide", "narrow"): set(), (): {"dual", "single"}}[kinds]


@pytest.mark.parametrize("path", ["deterministic", "renoise"])
def test_mixtures_with_the_teacher_follow_the_students_stored_path(config, tmp_path, path):
    student = make_student(tmp_path / "student", "dual", 1, path=path)
    asked = dataclasses.replace(config, students={"dual": [student]})
    plans = {one.label: one.plan for one in build_lineup(asked, NULL_TEXT).candidates}
    assert plans["semantic 1 + tail"] == load_student(student).plans["1+tail"]
    assert plans["head + detail 1"].path == path
