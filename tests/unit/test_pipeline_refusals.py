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

from raydistill.artifacts import tree_digest
from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line
from raydistill.consistency.phases import split_evenly
from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, MissingValue, StaleArtifact
from raydistill.models.folders import built_beside
from raydistill.models.teacher import load_teacher, load_whole_teacher
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.pipelines.schedulers import fit_flow
from raydistill.sampler import build_plan, plan_times
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
    (copy / "transformer" / "more.fp16.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=r"transformer/more\.fp16"):
        export_pipeline(student, pipeline, copy, Wanted(name="small"))
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


def test_a_u_nets_scheduler_is_given_times_where_it_has_others(tmp_path):
    student, pipeline = save_real_student(tmp_path, "modelscope", "motion")
    for plan, path, kind, steps, lines in (
        ("4", "", "LCMScheduler", [999, 759, 499, 259], False),
        ("4", "deterministic", "DPMSolverMultistepScheduler", [999, 759, 499, 259], True),
        ("2", "deterministic", "DPMSolverMultistepScheduler", [999, 499], False),
        ("3", "", "LCMScheduler", [999, 899, 299], True),
    ):
        out = tmp_path / f"{plan}{path}"
        done = export_pipeline(student, pipeline, out, Wanted(name="small", plan=plan, path=path))
        assert json.loads((out / "model_index.json").read_text())["scheduler"] == ["diffusers", kind]
        assert [round(1000 * t) - 1 for t in done.steps.times] == steps
        assert (f"timesteps = {steps}\n" in (out / "README.md").read_text()) == lines
        assert (done.steps.bare != done.steps.times) == lines


def test_two_experts_of_a_u_net_that_re_noise_are_refused(tmp_path):
    student, pipeline = save_real_student(tmp_path, "modelscope", "dual")
    with pytest.raises(InvalidValue, match="two experts re-noise"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", path="renoise"))
    assert not (tmp_path / "out").exists()


def test_an_exported_pair_of_u_nets_is_no_teacher(tmp_path):
    """Its first network alone would be half of it."""
    student, pipeline = save_real_student(tmp_path, "animatediff", "dual")
    done = export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    with pytest.raises(MissingArtifact, match="two networks"):
        load_whole_teacher(done.folder)


@pytest.mark.parametrize("method", ["dual", "motion"])
def test_other_parts_than_the_students_are_refused(tmp_path, method):
    student, pipeline = save_real_student(tmp_path, "wan21", method)
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


def test_pipelines_that_are_not_whole_are_refused(tmp_path):
    student, pipeline = save_real_student(tmp_path, "wan21", "motion")

    def refused(says):
        with pytest.raises(MissingArtifact, match=says):
            export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
        assert not (tmp_path / "out").exists()

    weights = pipeline / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("text_encoder has no safetensors weights: convert them")
    shards = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    }
    (weights.parent / "model.safetensors.index.json").write_text(json.dumps(shards))
    weights.with_suffix(".bin").rename(weights.with_name("model-00001-of-00002.safetensors"))
    refused(r"text_encoder lacks model-00002-of-00002\.safetensors")
    shutil.rmtree(pipeline / "tokenizer")
    (weights.parent / "model.safetensors.index.json").unlink()
    refused("names tokenizer, of which nothing is there")


def test_wan22s_small_model_is_refused(dual, tmp_path):
    student, pipeline, _ = dual
    other = shutil.copytree(pipeline, tmp_path / "ti2v")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    with pytest.raises(InvalidValue, match="a time for each token"):
        load_teacher(other)
    with pytest.raises(InvalidValue, match="a time for each token"):
        export_pipeline(student, other, tmp_path / "out", Wanted(name="small"))


def test_names_that_no_file_can_have_are_refused(dual, tmp_path):
    student, pipeline, _ = dual
    for name in ("", "../out", "a/b"):
        with pytest.raises(InvalidValue, match=r"name = "):
            export_pipeline(student, pipeline, tmp_path / "out", Wanted(name=name))


def test_a_killed_exports_folder_goes_and_a_neighbours_stays(tmp_path):
    for name in (".run.0123abcd.part", ".run.v2.0123abcd.part"):
        (tmp_path / name).mkdir()
    with built_beside(tmp_path / "run") as beside:
        assert {path.name for path in tmp_path.iterdir()} == {beside.name, ".run.v2.0123abcd.part"}


def test_two_experts_that_re_noise_can_go_straight(dual, tmp_path, monkeypatch):
    student, pipeline, _ = dual
    card, plans = read_card(student)
    renoise = {"4": build_plan(4, card.boundary, card.grid, "renoise")}
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, renoise))
    with pytest.raises(InvalidValue, match="pipeline_path=deterministic"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    done = export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", path="deterministic"))
    assert done.steps.plan == plans["4"]


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
    wanted = [one.t for one in plan.jumps]

    def times_of(scheduler):
        scheduler.set_timesteps(len(wanted))
        return scheduler.sigmas[:-1].tolist()

    scheduler = fit_flow(FlowMatchEulerDiscreteScheduler, wanted, boundary, times_of)
    assume(scheduler is not None)
    found = times_of(scheduler)
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
    torn = '{"stage": "detail", "st'
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + torn)
    figures = {"right": {"value": 0.5, "low": 0.25, "high": 0.75}}
    scores = {"4": {"num_clips": 64, "num_seeds": 1, "figures": figures}}
    wanted = Wanted(name="mine", license="apache-2.0", scores=scores)
    done = export_pipeline(run / "student", pipeline, tmp_path / "out", wanted)
    text = (done.folder / "README.md").read_text()
    about = ModelCard(text).data.to_dict()
    assert str(tmp_path) not in text
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
    for part in ("mine/pipeline: WanPipeline, ", "  t = 1, ", "deterministic\n", "README.md\n"):
        assert part in said
    assert "by the scheduler's config alone 1, " in said
    assert "# mine\n" in (tmp_path / "mine" / "pipeline" / "README.md").read_text()
    job.main()
    assert "MB, was there already\n" in capsys.readouterr().out
    for said, says in ((["student=s"], "output"), (["student=s", "pipeline=p"], "teacher")):
        with pytest.raises(MissingValue, match=says):
            from_command_line(ExportConfig, said)
    both = ["student=s", "teacher=t", "output=o"]
    for wrong, says in (
        (["license=Apache 2.0", "pipeline=p"], "identifier"),
        (["pipeline_plan=4"], "left out"),
    ):
        with pytest.raises(InvalidValue, match=says):
            from_command_line(ExportConfig, [*both, *wrong])
    with pytest.raises(InvalidValue, match="default_plan = '4': left out without output"):
        from_command_line(ExportConfig, ["student=s", "teacher=t", "pipeline=p", "default_plan=4"])


def test_scores_are_read_from_an_evaluation_of_the_student(dual, tmp_path, monkeypatch):
    student, pipeline, _ = dual
    job = load_job("export")
    seen = []
    figures = {"right": {"value": 0.5, "low": 0.25, "high": 0.75}}
    scores = {"4": {"num_clips": 64, "num_seeds": 1, "figures": figures}}
    monkeypatch.setattr(job, "read_scores", lambda *given: seen.append(given) or scores)
    arguments = [
        f"student={student}",
        f"teacher={pipeline}",
        f"pipeline={tmp_path}/mine",
        "scores=evaluation",
    ]
    monkeypatch.setattr("sys.argv", ["export.py", *arguments])
    job.main()
    assert seen[0][0] == "evaluation"
    assert set(seen[0][2]) == {"2", "2+tail", "4"}
    assert seen[0][1]["student"] == tree_digest(student)
    assert "| right | 0.5 | 0.25 to 0.75 |" in (tmp_path / "mine" / "README.md").read_text()
