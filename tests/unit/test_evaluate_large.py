"""The evaluation of larger clips: measured in the small world's own pixels, shown in all of theirs."""

import dataclasses
import io

import numpy as np
import pytest
from evaluate_cases import NULL_TEXT, make_config, make_student, make_weights
from job_cases import load_job
from PIL import Image

from raydistill.config.evaluate import EvaluateConfig, LatencyConfig
from raydistill.errors import InvalidValue, StaleArtifact
from raydistill.evaluation import pictures
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import build_lineup

job = load_job("evaluate")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    weights = make_weights(tmp_path_factory.mktemp("weights"))
    return make_config(weights, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    """For 64 pixels, with an untrained student of them."""
    folder = tmp_path_factory.mktemp("large")
    student = make_student(folder / "dual", "dual", 1, side=8)
    return dataclasses.replace(
        small,
        size=64,
        students={"dual": [student]},
        output=str(folder / "output"),
        latency=LatencyConfig(rounds=0),
    )


@pytest.fixture(scope="module")
def report(config):
    return build_report(config, job.make_setting(config), build_lineup(config, NULL_TEXT))


def test_an_untrained_student_has_finite_figures(report):
    assert {"teacher 3", "dual 2", "dual 1"} <= {row["label"] for row in report.results["rows"]}
    for row in [*report.results["rows"], *report.results["reference"]]:
        assert {"frechet", "right/all", "path/jitter", "sharpness", "watermark"} <= row["figures"].keys()
        for figure in row["figures"].values():
            assert np.isfinite([figure["value"], figure["low"], figure["high"]]).all()


def test_pictures_show_every_pixel(report, config):
    strips = Image.open(io.BytesIO(report.pictures["strips"]))
    clips = Image.open(io.BytesIO(report.pictures["clips"]))
    assert (strips.height - 4) // (64 + pictures.GAP_PX) == 3  # real clips, teacher, student in 2 steps
    columns, cell = 2, 4 * 64 + 3
    assert strips.width == pictures.LABEL_PX + columns * (cell + pictures.GAP_PX)
    assert clips.width == pictures.LABEL_PX + columns * (64 + pictures.GAP_PX)
    drawn = np.asarray(strips.convert("RGB"))[-3 * (64 + pictures.GAP_PX) :][:64]  # the real clips' row
    frame = job.draw_clips(1, config.seed, "control", 64)[0, 0]
    assert (drawn[:, pictures.LABEL_PX : pictures.LABEL_PX + 64] == frame).all()


def test_real_clips_measure_the_same_at_both_sizes(small, config, tmp_path):
    """Speeds, paths, sharpness, features: all in the small world's own pixels."""
    settings = [job.make_setting(dataclasses.replace(one, num_clips=36)) for one in (small, config)]
    assert [one.control.shape[1:] for one in settings] == [(16, 32, 32, 3), (16, 64, 64, 3)]
    assert settings[1].latent_shape == (4, 16, 8, 8)
    assert [one.real.shape[2] for one in settings] == [32, 32]
    records = [one.meter.control for one in settings]
    values, large = (record.values for record in records)
    assert large["path/direction"].all()
    assert large["path/speed_error"].max() < 0.06
    for name, most in {"path/jitter": 0.03, "sharpness": 0.05, "vividness": 0.02, "watermark": 0.02}.items():
        assert np.abs(large[name] - values[name]).max() < most, name
    assert records[1].features == pytest.approx(records[0].features, rel=0, abs=0.01)


def test_a_student_of_another_size_is_refused(small, config):
    with pytest.raises(StaleArtifact, match="size"):
        job.make_setting(dataclasses.replace(small, size=64))
    with pytest.raises(StaleArtifact, match="size"):
        job.make_setting(dataclasses.replace(config, size=32))


def test_another_size_is_another_evaluation(small):
    lone = dataclasses.replace(small, students={})
    marks = [job.make_setting(dataclasses.replace(lone, size=size)).identity for size in (32, 64)]
    assert marks[0] != marks[1]


@pytest.mark.parametrize("size", [0, 48])
def test_sizes_that_cannot_be_drawn_are_refused(size):
    with pytest.raises(InvalidValue, match="size"):
        EvaluateConfig(size=size)
