"""Verdicts, tables, pictures and curves from figures made by hand."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from raydistill.errors import InvalidValue
from raydistill.evaluation import build, intervals, pictures, plots, report
from raydistill.evaluation.analysis_plots import draw_analysis
from raydistill.evaluation.summary import CONTROL, Row
from raydistill.evaluation.verdicts import Judgement, Verdict

WEIGHTS = intervals.clip_weights(200)


def share(right, seeds=1):
    """All-right figure of students that get the first `right` of 200 clips right."""
    return intervals.mean(np.tile(np.arange(200) < right, (seeds, 1)).astype(float), WEIGHTS)


def far(distance):
    """Frechet figure with a spread of 3 %."""
    draws = distance * (1 + 0.03 * np.random.default_rng(0).normal(size=len(WEIGHTS)))
    return intervals.Bootstrapped(distance, draws, 200)


def row(label, right, distance, steps=4):
    figures = {"right/all": share(right), "frechet": far(distance)}
    return Row(label, label.split()[0], steps, steps, 0.01, (), figures)


@pytest.fixture
def rows():
    listed = [
        row("teacher 50", 190, 10.0),
        row("teacher 4", 120, 40.0),
        row("teacher 2", 20, 90.0),
        row("dual 4", 188, 10.2),
        row("dual 2", 150, 20.0),
        row("single 4", 188, 12.0),
        row(CONTROL, 200, 2.0),
    ]
    return {one.label: one for one in listed}


class Anchor:
    """What a judgement asks of the teacher's candidate."""

    label = "teacher 50"


def outcomes(rows, latency=None):
    found = Judgement(rows, Anchor(), latency or {}).all()
    return {verdict.claim: verdict for verdict in found}


def test_verdicts_say_held_not_held_undecided_and_skipped(rows):
    found = outcomes(rows)
    assert found["dual 4: Frechet over teacher 50's"].outcome == "held"
    assert found["dual 4: Frechet over teacher 50's, both less real clips'"].outcome == "held"
    assert (
        found["dual 4: all attributes right, less teacher 50's"].outcome == "undecided"
    )  # -1 point, some clips
    assert found["dual 2: all attributes right, less teacher 50's"].outcome == "not held"
    assert found["dual 4: all attributes right, less teacher 4's"].outcome == "held"
    assert found["dual 4: Frechet over single 4's"].outcome == "held"
    missing = found["dual 2: all attributes right, less single 2's"]
    assert (missing.outcome, missing.reason) == ("skipped", "single 2 not measured")
    assert found["latency of teacher 50 over dual 4, batch 1"].reason == "teacher 50 and dual 4 not timed"


def test_ratios_are_paired_so_that_common_spread_cancels(rows):
    figure = outcomes(rows)["dual 4: Frechet over teacher 50's"].figure
    assert figure.value == pytest.approx(1.02)
    assert figure.high - figure.low < 1e-9


def test_a_distance_that_real_clips_have_too_is_no_yardstick(rows):
    rows["teacher 50"] = row("teacher 50", 190, 2.05)
    strict = outcomes(rows)["dual 4: Frechet over teacher 50's, both less real clips'"]
    assert strict.outcome == "skipped"
    assert "not apart from real clips" in strict.reason


@pytest.mark.parametrize(("seconds", "outcome"), [(2.5, "held"), (1.5, "not held")])
def test_latency_is_a_ratio_of_medians(rows, seconds, outcome):
    timed = {"8": {"teacher 50": [seconds, seconds * 1.02, seconds], "dual 4": [0.1, 0.1, 0.101]}}
    assert outcomes(rows, timed)["latency of teacher 50 over dual 4, batch 8"].outcome == outcome


@pytest.mark.parametrize(
    ("side", "interval", "outcome"),
    [
        ("at most", (1.0, 1.1), "held"),
        ("at most", (1.0, 1.2), "undecided"),
        ("at most", (1.11, 1.2), "not held"),
        ("at least", (1.1, 1.2), "held"),
        ("at least", (1.0, 1.2), "undecided"),
        ("at least", (1.0, 1.09), "not held"),
        ("more than", (1.1, 1.1), "not held"),
        ("more than", (1.101, 1.2), "held"),
        ("less than", (1.0, 1.1), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(side, interval, outcome):
    assert Verdict("claim", 1.1, side, "x", intervals.Estimate(1.1, *interval, 10)).outcome == outcome


def test_students_seeds_are_named(rows):
    assert "one training seed" in outcomes(rows)["dual 4: all attributes right, less single 4's"].text
    for label in ("dual 4", "single 4"):
        rows[label] = Row(label, label[:-2], 4, 4, 0.01, (), {"right/all": share(180, 3), "frechet": far(10)})
        rows[label].figures["frechet"] = intervals.over_seeds(
            [10, 10, 10], np.stack([far(10).draws] * 3), label, 200
        )
    assert "3 training seeds" in outcomes(rows)["dual 4: all attributes right, less single 4's"].text


def near(label, distance, steps=4):
    """Row of a real teacher's: how far its latents are from the teacher's, with a spread of a tenth."""
    draws = np.random.default_rng(0).normal(distance, 0.1, len(WEIGHTS))
    figure = intervals.Bootstrapped(distance, draws, 200)
    figures = {} if label == "teacher 50" else {"teacher/latent_rmse": figure}
    return Row(label, label.split()[0], steps, steps, 0.01, (), figures | {"features/frechet": far(5.0)})


def test_of_real_teachers_students_only_what_can_be_known_is_claimed():
    listed = [near("teacher 50", 0), near("teacher 4", 0.9), near("dual 4", 0.5), near("single 4", 0.4)]
    listed += [near("motion 4", 0.9), near("dual 2", 0.6)]
    rows = {one.label: one for one in listed}
    real = {"features/frechet": far(1.0)}
    rows["codec round trip"] = Row("codec round trip", "reference", 0, 0, 0.0, (), real)
    rows["other 4"] = dataclasses.replace(near("other 4", 0.1), teacher="teacher_b")  # of its own clips
    timed = {"1": {"teacher 50": [2.0, 2.0], "dual 4": [0.1, 0.1], "single 4": [0.5, 0.5]}}
    found = Judgement(rows, Anchor(), timed, "features/frechet").of_real()
    outcomes = {verdict.claim: verdict.outcome for verdict in found}
    assert outcomes == {
        "dual 4: distance of latents to teacher 50's, less teacher 4's": "held",
        "single 4: distance of latents to teacher 50's, less teacher 4's": "held",
        "dual 4: distance of latents to teacher 50's, less single 4's": "not held",
        "dual 4: Frechet over teacher 50's, both less real clips'": "held",
        "single 4: Frechet over teacher 50's, both less real clips'": "held",
        "motion 4: Frechet over teacher 50's, both less real clips'": "held",
        "latency of teacher 50 over dual 4, batch 1": "held",
        "latency of teacher 50 over single 4, batch 1": "not held",
        "latency of teacher 50 over motion 4, batch 1": "skipped",
    }
    for one in rows.values():
        one.figures.pop("features/frechet")
    claims = [one.claim for one in Judgement(rows, Anchor(), {}, "features/frechet").of_real()]
    assert claims == list(outcomes)[:3]


def test_large_and_long_clips_are_shown_smaller_and_shorter():
    """Of the same shape, from the first frame to the last; small ones stay as they are."""
    brightness = np.arange(81, dtype=np.uint8)[None, :, None, None, None]
    shown = pictures.reduced(np.broadcast_to(brightness, (2, 81, 60, 256, 3)))
    assert shown.shape == (2, 24, 30, 128, 3)
    assert shown[1, :, 0, 0, 0].tolist() == np.linspace(0, 80, 24).round().tolist()
    halves = np.zeros((1, 1, 4, 512, 3), np.uint8)
    halves[..., ::2, :] = 200
    assert np.unique(pictures.reduced(halves)).tolist() == [100]
    small = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 48, 3), np.uint8)
    assert (pictures.reduced(small) == small).all()
    strips = pictures.draw_strips(
        {"dual 4": pictures.reduced(np.zeros((1, 8, 480, 832, 3), np.uint8))}, ["a"]
    )
    assert Image.open(io.BytesIO(strips)).size[0] < 4 * 128 + 200


@pytest.fixture
def results(rows):
    return {
        "settings": {
            "lead": "lead",
            "num_clips": 200,
            "students": {"dual": 1},
            "guidance_scale": 2.0,
            "threads": 1,
            "latency_batch": 1,
            "latency_rounds": 7,
        },
        "null": 2.0,
        "rows": [rows[label].as_dict() for label in ("teacher 50", "dual 4")],
        "reference": [Row(CONTROL, "reference", 0, 0, 0.0, (), rows[CONTROL].figures).as_dict()],
        "latency": {"1": {"dual 4": intervals.median([0.02, 0.03, 0.02]).estimate().as_dict()}},
        "verdicts": [{**verdict.as_dict(), "text": verdict.text} for verdict in outcomes(rows).values()],
        "skipped": [],
    }


def test_markdown_table_lines_up_and_shows_intervals(results):
    lines = report.markdown_table(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[0] == "| sampler | passes | Frechet | all right % | ms per clip |"
    assert table[3].startswith("| dual 4 | 4 | 10.2 (9.")
    assert table[3].endswith("| 20.0 |")
    assert table[2].endswith("| 10.0 |")  # not timed on its own: from the batched run
    assert table[4].startswith(f"| {CONTROL} | - | 2.0 (")
    assert "* **held**: dual 4: Frechet over teacher 50's: 1.02" in "\n".join(lines)
    assert "not comparable with FVD" in "\n".join(lines)


def test_what_was_not_timed_in_turn_shows_no_time_and_a_study_names_its_columns(results):
    assert "median of 7 rounds, 1 threads, samplers in turn" in report.footnote(results)
    results["settings"] |= {"latency_rounds": 0, "columns": ["right/all"]}
    assert "not timed" in report.footnote(results)
    assert report._seconds(results, results["rows"][0]) == ("-", "")
    table = report.markdown_table(results).splitlines()
    assert table[0] == "| sampler | passes | all right % | ms per clip |"
    assert " to " in table[3]


def test_how_frames_look_is_drawn_where_it_is_asked(results):
    assert not report.asks_for_looks(results)
    studied = {**results, "settings": {**results["settings"], "columns": ["watermark"]}}
    motion = {**results, "rows": [{**results["rows"][0], "group": "motion"}]}
    assert report.asks_for_looks(studied)
    assert report.asks_for_looks(motion)
    figure = {"value": 0.3, "low": 0.2, "high": 0.4}
    rows = [{**row, "figures": {**row["figures"], "watermark": figure}} for row in results["rows"]]
    assert plots.draw_quality(rows) == plots.draw_quality(results["rows"])
    assert plots.draw_quality(rows, panels=plots.LOOKS) != plots.draw_quality(
        results["rows"], panels=plots.LOOKS
    )


def test_page_escapes_what_it_did_not_write(results):
    results["skipped"] = [{"what": "<script>alert(1)</script>", "reason": "&"}]
    results["rows"][0]["label"] = "<img src=x>"
    page = report.html(results, {})
    assert "<script" not in page
    assert "<img src=x>" not in page


def test_readme_keeps_all_but_the_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table:begin -->\nold | \\1\n<!-- table:end -->\nb\n", encoding="utf-8")
    report.update_readme(readme, "| new \\1 |\n")
    assert (
        readme.read_text(encoding="utf-8") == "a\n<!-- table:begin -->\n| new \\1 |\n<!-- table:end -->\nb\n"
    )
    for broken in ("no markers", "<!-- table:end --> <!-- table:begin -->", "<!-- table:begin -->"):
        readme.write_text(broken, encoding="utf-8")
        with pytest.raises(InvalidValue, match="table:begin"):
            report.update_readme(readme, "new")
        assert readme.read_text(encoding="utf-8") == broken


def test_pictures_of_the_readme_have_a_limit(tmp_path):
    written = report.publish_pictures({"clips": b"x" * 1000}, tmp_path)
    assert [path.read_bytes() for path in written] == [b"x" * 1000]
    with pytest.raises(InvalidValue, match="1500000"):
        report.publish_pictures({"clips": b"x" * 1_000_000, "strips": b"x" * 600_000}, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


CLIPS = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 32, 3), dtype=np.uint8)
CAPTIONS = [f"a red square moves slowly left over clip {n}" for n in range(3)]


def test_strips_show_frames_of_each_sampler_unaltered():
    strip = np.asarray(Image.open(io.BytesIO(pictures.draw_strips({"one": CLIPS}, CAPTIONS, zoom=1))))
    shown = np.linspace(0, 15, 4).round().astype(int)
    cells = strip[-pictures.GAP_PX - 32 : -pictures.GAP_PX, pictures.LABEL_PX :]
    for clip in range(3):
        left = clip * (4 * 33 - 1 + pictures.GAP_PX)
        for number, frame in enumerate(shown):
            cell = cells[:, left + 33 * number : left + 33 * number + 32]
            assert (cell == CLIPS[clip, frame]).all()


def test_gif_has_every_frame_and_shrinks_to_its_limit():
    def draw(count):
        return pictures.draw_gif({"one": CLIPS[:count], "two": CLIPS[:count]}, CAPTIONS[:count])

    with Image.open(io.BytesIO(draw(3))) as gif:
        assert gif.n_frames == 16
        assert "loop" in gif.info
    limit = len(draw(2))
    assert pictures.fit_under(limit, draw, (3, 2, 1)) == draw(2)
    assert pictures.fit_under(10, draw, (3, 2, 1)) == draw(1)


def test_metrics_of_a_killed_run_lose_only_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss/a": 2.0}\n{"step": 2, "loss/a": 1.0}\n{"step": 3, "lo', encoding="utf-8"
    )
    assert [line["step"] for line in plots.read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        plots.read_metrics(path)


def test_losses_and_quality_are_drawn_whatever_is_there(results):
    lines = [
        {"stage": stage, "step": n, "loss/consistency": 1 / n, "bucket/0.6-0.7/consistency": 2 / n}
        for stage in ("semantic", "detail")
        for n in range(1, 60)
    ]
    lines += [{"stage": "detail", "step": 60, "loss/adversarial": -0.5}, {"stage": "other", "step": 1}]
    for drawn in (
        plots.draw_losses({"dual": lines, "single": lines[:60]}),
        plots.draw_quality(results["rows"], {"frechet": 2.0}),
        plots.draw_quality([{**results["rows"][0], "figures": {}}]),
        plots.draw_figures(results["rows"], ["right/all", "frechet", "watermark"], {"frechet": 2.0}),
    ):
        Image.open(io.BytesIO(drawn)).verify()


def test_a_study_of_one_number_of_steps_has_no_curves_but_all_its_measures(results):
    columns = ["frechet", "right/all"]
    results["settings"]["columns"] = columns
    real = {name: one["value"] for name, one in results["reference"][0]["figures"].items()}
    assert build._quality(results) == plots.draw_figures(results["rows"], columns, real)
    results["rows"].append({**results["rows"][1], "label": "dual 2", "num_steps": 2})
    assert build._quality(results) == plots.draw_quality(results["rows"], {"frechet": results["null"]})


def test_analysis_is_drawn_and_kept_as_numbers(tmp_path):
    result = {
        "times": [1.0, 0.5, 0.1],
        "steps": [10, 20],
        "loss": [[3.0, 2.0, 1.0], [2.0, None, 0.5]],
        "gradient": np.ones((2, 3)),
        "change_times": [0.9, 0.5],
        "change": [0.3, 0.1],
        "boundary": 0.5,
        "in_use": 0.6,
        "title": "a teacher",
    }
    draw_analysis(result, tmp_path / "analysis.png")
    with Image.open(tmp_path / "analysis.png") as picture:
        assert picture.width > 1000
    kept = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert kept["loss"][1] == [2.0, None, 0.5]
    assert kept["boundary"] == 0.5
    with pytest.raises(ValueError, match=r"2 steps x 2 times"):
        draw_analysis({**result, "times": [1.0, 0.5]}, tmp_path / "wrong.png")
