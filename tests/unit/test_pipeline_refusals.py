"""Exported folders: what is refused, what a stopped export leaves, fitted times, the model card, the job."""

import json
import shutil

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from export_cases import save_real_student
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from job_cases import load_job

from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line
from raydistill.consistency.phases import split_evenly
from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, MissingValue, StaleArtifact
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.pipelines.schedulers import fit_flow
from raydistill.sampler import build_plan, plan_lcm, plan_times
from raydistill.student import read_card


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """A student, its teacher's pipeline, and what they were exported to."""
    folder = tmp_path_factory.mktemp("wan21")
    student, pipeline = save_real_student(folder, "wan21", "dual")
    return student, pipeline, export_pipeline(student, pipeline, folder / "out", Wanted(name="small")).folder


def test_the_same_export_again_does_nothing_and_another_is_refused(dual, tmp_path):
    student, pipeline, folder = dual
    again = export_pipeline(student, pipeline, folder, Wanted(name="small"))
    assert not again.written
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(InvalidValue, match="another export is there"):
        export_pipeline(student, pipeline, copy, Wanted(name="small", plan="2"))
    (copy / "transformer" / "config.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="transformer/config"):
        export_pipeline(student, pipeline, copy, Wanted(name="small"))
    (copy / "export.json").unlink()
    with pytest.raises(InvalidValue, match="something else is there"):
        export_pipeline(student, pipeline, copy, Wanted(name="small"))


def test_a_stopped_export_leaves_nothing(dual, tmp_path, monkeypatch):
    student, pipeline, _ = dual

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("raydistill.pipelines.folder._write_index", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("2+tail", "steps of the teacher"),
        ("16", "one of 2, 2\\+tail, 4"),
        ("re", "re-noise"),
        ("1", "beyond"),
    ],
)
def test_plans_that_no_scheduler_takes(dual, tmp_path, monkeypatch, plan, says):
    student, pipeline, _ = dual
    card, plans = read_card(student)
    more = {
        "re": build_plan(4, card.boundary, card.grid, "renoise"),
        "1": build_plan(1, card.boundary, card.grid),
    }
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, plans | more))
    with pytest.raises(InvalidValue, match=says):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", plan=plan))
    assert not list(tmp_path.iterdir())


def test_deterministic_plans_of_a_u_net_are_refused(tmp_path, monkeypatch):
    student, pipeline = save_real_student(tmp_path, "modelscope", "motion")
    card, plans = read_card(student)
    straight = {"4": plan_lcm(4, card.grid, "deterministic")}
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, straight))
    with pytest.raises(InvalidValue, match="LCM's, which re-noises"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    uneven = {"3": plan_times((1.0, 0.9, 0.3, 0.0), None, 0.001, "renoise")}
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, plans | uneven))
    with pytest.raises(InvalidValue, match=r"timesteps \[999"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", plan="3"))


def test_other_parts_than_the_students_are_refused(dual, tmp_path):
    student, pipeline, _ = dual
    with pytest.raises(MissingArtifact, match="expected the whole folder of a WanPipeline"):
        export_pipeline(student, pipeline / "transformer", tmp_path / "out", Wanted(name="small"))
    for part, says in (("vae", "another codec"), ("text_encoder", "another text encoder")):
        other = shutil.copytree(pipeline, tmp_path / part)
        config = other / part / "config.json"
        config.write_text(config.read_text() + " ")
        with pytest.raises(StaleArtifact, match=says):
            export_pipeline(student, other, tmp_path / "out", Wanted(name="small"))
    other = shutil.copytree(pipeline, tmp_path / "network")
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(StaleArtifact, match="another teacher"):
        export_pipeline(student, other, tmp_path / "out", Wanted(name="small"))
    assert not (tmp_path / "out").exists()


@given(
    semantic=st.integers(1, 4),
    detail=st.integers(1, 4),
    shift=st.floats(1.0, 20.0),
    node=st.integers(20, 40),
)
@settings(max_examples=25, deadline=None)
def test_wans_scheduler_meets_the_boundary_and_the_last_start(semantic, detail, shift, node):
    """Whatever the shift and the split: no jump crosses, and up to three steps are met whole."""
    grid = TimeGrid(50, shift=shift)
    boundary = grid.nodes[node]
    upper = split_evenly(1.0, boundary, semantic, grid)
    lower = split_evenly(boundary, 0.0, detail, grid)
    plan = plan_times((*upper, *lower[1:]), boundary)
    try:
        scheduler = fit_flow(FlowMatchEulerDiscreteScheduler, plan)
    except InvalidValue:
        assume(False)
    scheduler.set_timesteps(len(plan.jumps))
    found, wanted = scheduler.sigmas[:-1].tolist(), [one.t for one in plan.jumps]
    assert sorted(found, reverse=True) == found
    assert found[semantic] == pytest.approx(boundary, abs=1e-6)
    assert found[-1] == pytest.approx(wanted[-1], abs=1e-6)
    if len(wanted) <= 3:
        assert found == pytest.approx(wanted, abs=1e-6)


def test_the_model_card_tells_what_it_was_made_of(dual, tmp_path):
    student, pipeline, _ = dual
    run = tmp_path / "run"
    shutil.copytree(student, run / "student")
    objective = {"consistency": 1.0, "adversarial": 0.5, "motion": 0.0}
    (run / "config.yaml").write_text(json.dumps({"detail": {"objective": objective}}))
    line = {"stage": "detail", "step": 7, "loss/consistency": 0.25, "loss/adversarial": 1.5}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    figures = {"right": {"value": 0.5, "low": 0.25, "high": 0.75}}
    scores = {"4": {"num_clips": 64, "num_seeds": 1, "figures": figures}}
    wanted = Wanted(name="mine", license="apache-2.0", scores=scores)
    done = export_pipeline(run / "student", pipeline, tmp_path / "out", wanted)
    text = (done.folder / "README.md").read_text()
    about = ModelCard(text).data.to_dict()
    assert about["license"] == "apache-2.0"
    assert (about["library_name"], about["pipeline_tag"]) == ("diffusers", "text-to-video")
    card, _ = read_card(run / "student")
    for part in (
        "# mine\n",
        "DCM (arXiv 2506.03123)",
        "| detail | 7 | consistency | 1 | 0.25 |",
        "| detail | 7 | adversarial | 0.5 | 1.5 |",
        f"`{card.sources['teacher']}`",
        f"| data | `{'0' * 64}` |",
        "On 64 clips",
        "| right | 0.5 | 0.25 to 0.75 |",
        "`apache-2.0`",
        f"meet at t = {card.boundary:.6g}",
    ):
        assert part in text
    assert "| detail | 7 | motion" not in text
    plain = export_pipeline(student, pipeline, tmp_path / "plain", Wanted(name="mine"))
    text = (plain.folder / "README.md").read_text()
    for part in ("Not measured.", "Not stated by whoever exported it", "were not beside the student"):
        assert part in text


def test_the_job_says_what_it_wrote(dual, tmp_path, monkeypatch, capsys):
    student, pipeline, _ = dual
    arguments = [f"student={student}", f"teacher={pipeline}", f"pipeline={tmp_path}/mine/pipeline"]
    monkeypatch.setattr("sys.argv", ["export.py", *arguments])
    job = load_job("export")
    job.main()
    said = capsys.readouterr().out
    for part in ("mine/pipeline: WanPipeline, ", "FlowMatchEulerDiscreteScheduler, t = 1, ", "README.md\n"):
        assert part in said
    assert "the stored plan's times are 1, " in said
    assert "# mine\n" in (tmp_path / "mine" / "pipeline" / "README.md").read_text()
    job.main()
    assert "MB, was there already\n" in capsys.readouterr().out
    for said, says in ((["student=s"], "output"), (["student=s", "pipeline=p"], "teacher")):
        with pytest.raises(MissingValue, match=says):
            from_command_line(ExportConfig, said)
