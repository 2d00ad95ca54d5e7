"""The evaluation from weights to report, on small random networks and four clips."""

import base64
import dataclasses
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from evaluate_cases import NULL_TEXT, make_config, make_student, make_weights
from job_cases import load_job, write_latents
from PIL import Image

from raydistill.artifacts import tree_digest
from raydistill.config.evaluate import LatencyConfig, PicturesConfig
from raydistill.config.load import dump
from raydistill.errors import MissingArtifact
from raydistill.evaluation import pictures
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import Lineup, build_lineup
from raydistill.evaluation.records import RecordStore
from raydistill.evaluation.run import Bench, draw_latents
from raydistill.world import sprites

job = load_job("evaluate")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights")
    make_weights(weights)
    return make_config(weights, tmp_path_factory.mktemp("output"))


def evaluate(config):
    return build_report(config, job.make_setting(config), build_lineup(config, NULL_TEXT))


@pytest.fixture(scope="module")
def setting(config):
    return job.make_setting(config)


@pytest.fixture(scope="module")
def lineup(config):
    return build_lineup(config, NULL_TEXT)


@pytest.fixture(scope="module")
def first(config, setting, lineup):
    return build_report(config, setting, lineup)


@pytest.fixture
def store(config, first, tmp_path):
    """Copy the records of a finished run, to be damaged."""
    return RecordStore(shutil.copytree(Path(config.output, "records"), tmp_path / "records"))


def run_again(store, setting, lineup):
    bench = Bench(setting, store)
    return bench.run(lineup), set(bench.computed)


def test_every_sampler_has_its_row_with_steps_and_passes(first):
    rows = {row["label"]: (row["num_steps"], row["passes"]) for row in first.results["rows"]}
    assert list(rows.items()) == [
        ("teacher 3", (3, 6)),
        ("teacher 1", (1, 2)),
        ("dual 2", (2, 2)),
        ("dual 1", (1, 1)),
        ("semantic 1 + tail", (7, 13)),
        ("head + detail 1", (5, 9)),
        ("single 2", (2, 2)),
        ("single 1", (1, 1)),
    ]


def test_students_of_a_kind_are_averaged_with_their_number(first):
    seeds = {row["label"]: row["figures"]["frechet"]["num_seeds"] for row in first.results["rows"]}
    assert seeds["dual 2"] == 2
    assert seeds["semantic 1 + tail"] == 2
    assert seeds["single 2"] == seeds["teacher 3"] == 1


def test_figures_are_numbers_inside_their_intervals(first):
    for row in [*first.results["rows"], *first.results["reference"]]:
        assert {"frechet", "right/all", "path/jitter", "sharpness", "near_black"} <= row["figures"].keys()
        for figure in row["figures"].values():
            assert np.isfinite([figure["value"], figure["low"], figure["high"]]).all()
            assert figure["low"] <= figure["high"]


def test_the_anchor_is_not_compared_with_itself(first):
    figures = {row["label"]: row["figures"] for row in first.results["rows"]}
    assert "teacher/psnr" not in figures["teacher 3"]
    assert figures["dual 2"]["teacher/latent_rmse"]["value"] > 0


def test_the_guided_anchor_is_timed_in_one_pass_a_step_and_in_two(first):
    timed = first.results["latency"]
    assert {"teacher 3", "teacher 3 with two passes a step", "dual 2"} <= timed["1"].keys()
    assert {"teacher 3", "teacher 3 with two passes a step"} <= timed["16"].keys()
    assert "teacher 3 with two passes a step" not in {row["label"] for row in first.results["rows"]}


def test_real_clips_move_as_asked(first):
    real = first.results["reference"][0]["figures"]
    assert real["path/direction"]["value"] == 1
    assert real["path/speed_error"]["value"] < 0.04
    assert real["frechet"]["value"] == first.results["null"]


def test_clips_depend_on_noise_but_not_on_the_batch(setting, lineup):
    one = next(c for c in lineup.candidates if c.label == "dual 2")
    together = draw_latents(one, setting, range(4))
    alone = np.concatenate([draw_latents(one, setting, [i]) for i in range(4)])
    assert together == pytest.approx(alone, abs=1e-5)
    other = dataclasses.replace(setting, seed=setting.seed + 1)
    assert np.abs(together - draw_latents(one, other, range(4))).mean() > 0.1


def test_second_run_computes_nothing_and_says_the_same(config, setting, lineup, first):
    again = build_report(config, setting, lineup)
    assert (len(first.computed), len(again.computed)) == (len(lineup.candidates), 0)
    assert again.results == first.results
    assert again.pictures == first.pictures


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "no manifest", "torn manifest"])
def test_a_damaged_record_is_computed_again(store, setting, lineup, damage, caplog):
    (place,) = store.folder.glob("dual-1-1-*/record.safetensors")
    whole, _ = run_again(store, setting, lineup)
    data, manifest = bytearray(place.read_bytes()), place.with_name("manifest.json")
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        place.write_bytes(data)
    elif damage == "truncated":
        place.write_bytes(data[:-100])
    elif damage == "gone":
        place.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:-30])
    records, computed = run_again(store, setting, lineup)
    assert computed == {"dual-1-1"}
    assert "dual-1-1 is computed again" in caplog.text
    assert (records["dual-1-1"].latents == whole["dual-1-1"].latents).all()
    assert run_again(store, setting, lineup)[1] == set()


def test_other_weights_are_measured_and_the_rest_is_not(store, config, setting, tmp_path):
    other = make_student(tmp_path / "other", "single", 9)
    changed = dataclasses.replace(config, students={**config.students, "single": [other]})
    assert run_again(store, setting, build_lineup(changed, NULL_TEXT))[1] == {"single-2-0", "single-1-0"}


def test_a_sampler_is_measured_once_whatever_it_is_called(store, setting, lineup):
    renamed = [dataclasses.replace(one, label=f"{one.label} anew") for one in lineup.candidates]
    records, computed = run_again(store, setting, dataclasses.replace(lineup, candidates=tuple(renamed)))
    assert computed == set()
    assert set(records) == {one.name for one in renamed}


def test_another_anchor_changes_what_is_compared_with_it(store, config, setting):
    changed = dataclasses.replace(config, teacher_steps=(1, 3), students={})
    assert run_again(store, setting, build_lineup(changed, NULL_TEXT))[1] == {"teacher-1-0", "teacher-3-0"}


@pytest.mark.parametrize("change", [{}, {"seed": 5}, {"num_clips": 5}, {"reference_clips": 9}])
def test_other_noise_captions_or_clips_are_another_evaluation(store, config, lineup, change):
    setting = job.make_setting(dataclasses.replace(config, **change))
    two = Lineup((lineup.candidates[0], lineup.candidates[-1]), ())
    expected = {"teacher-3-0", "single-1-0"} if change else set()
    assert run_again(store, setting, two)[1] == expected


def test_what_is_missing_is_skipped_with_its_reason(config, tmp_path):
    codec = tree_digest(config.codec)
    write_latents(tmp_path / "videos", codec, 3)
    write_latents(tmp_path / "images", codec, 9, frames=1)
    trained_on = {name: str(tmp_path / name) for name in ("videos", "images", "nothing")}
    lean = dataclasses.replace(
        config,
        judge=str(tmp_path / "<no judge>"),
        students={"dual": [str(tmp_path / "nobody")]},
        metrics={},
        output=str(tmp_path / "lean"),
        latency=LatencyConfig(rounds=0),
        pictures=PicturesConfig(captions=2, strip_captions=2, beside=trained_on),
    )
    report = build_report(lean, job.make_setting(lean), build_lineup(lean, NULL_TEXT))
    reasons = {one["what"]: one["reason"] for one in report.results["skipped"]}
    assert reasons["single"] == "no single student given (students.single)"
    assert "nobody" in reasons["dual, student 0"]
    assert "no judge at" in reasons["attributes"]
    assert {verdict["outcome"] for verdict in report.results["verdicts"]} == {"skipped"}
    figures = report.results["rows"][0]["figures"]
    assert "right/all" not in figures
    assert figures["path/direction"]["num_clips"] == 4
    assert "losses" not in report.pictures
    assert reasons["nothing in the strips"] == f"no {tmp_path}/nothing"
    height = Image.open(io.BytesIO(report.pictures["strips"])).height
    assert height // (2 * sprites.SIZE + pictures.GAP_PX) == 4  # real clips, teacher, videos, images
    page = Path(lean.output, "report.html").read_text(encoding="utf-8")
    assert "&lt;no judge&gt;" in page
    assert "<no judge>" not in page


@pytest.mark.parametrize("lacks", [{"judge": "/nothing"}, {"students": {"dual": ["/nothing"]}}])
def test_strict_raises_for_what_is_missing(config, lacks):
    strict = dataclasses.replace(config, strict=True, **lacks)
    read = job.make_setting if "judge" in lacks else partial(build_lineup, null_text=NULL_TEXT)
    with pytest.raises(MissingArtifact, match="/nothing"):
        read(strict)


def test_page_holds_everything_and_fetches_nothing(config, first):
    page = Path(config.output, "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*\"(?!data:)|url\(|<script|<link|https?://", page)
    images = re.findall(r'src="data:image/(png|gif);base64,([^"]+)"', page)
    assert [kind for kind, _ in images] == ["png", "png", "gif", "png"]  # quality, strips, clips, losses
    for _, data in images:
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    for text in ("dual 2", "single 1", "codec round trip", "skipped", "loss curves of gone"):
        assert text in page


def test_parts_are_files_too(config, first):
    report = Path(config.output, "report")
    assert sorted(path.name for path in report.iterdir()) == [
        "clips.gif",
        "losses.png",
        "quality.png",
        "strips.png",
        "table.md",
    ]
    with Image.open(report / "clips.gif") as gif:
        assert gif.n_frames == 16
        assert gif.info["duration"] in (120, 130)  # 8 fps in hundredths of a second
    table = (report / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 8 + 2
    assert json.loads(Path(config.output, "results.json").read_text(encoding="utf-8")) == first.results


def test_captions_are_held_out_and_spread():
    asked = job.ask(72)
    assert all(sprites.held_out(sprites.Attributes.parse(caption)) for caption in asked.captions)
    assert len(set(asked.captions)) == 36
    assert len(set(asked.attributes["shape"][:6])) == 3
    assert (job.draw_clips(3, 1, "real") != job.draw_clips(3, 1, "control")).any()


def test_an_evaluation_none_of_whose_students_is_there_ends_at_once(config, tmp_path, monkeypatch):
    settings = tmp_path / "settings.yaml"
    dump(dataclasses.replace(config, students={"motion": [str(tmp_path / "nowhere")]}), settings)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--config", str(settings), "threads=1"])
    with pytest.raises(MissingArtifact, match=r"none of the students.*students\.KIND"):
        job.main()


def test_the_command_line_measures_prints_and_fills_the_readme(config, first, tmp_path, monkeypatch, capsys):
    settings = tmp_path / "settings.yaml"
    dump(dataclasses.replace(config, latency=LatencyConfig(rounds=0)), settings)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:begin -->\nold\n<!-- table:end -->\nafter\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--config", str(settings), "--update-readme", "threads=1"]
    )
    job.main()
    printed, filled = capsys.readouterr().out, readme.read_text(encoding="utf-8")
    assert "| dual 2 |" in printed
    assert "skipped loss curves of gone" in printed
    assert filled.startswith("before\n<!-- table:begin -->\n| sampler | passes |")
    assert filled.endswith("<!-- table:end -->\nafter\n")
    assert sorted(path.name for path in Path("docs").iterdir()) == ["clips.gif", "quality.png", "strips.png"]
