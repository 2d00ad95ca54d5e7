"""The runs of jobs/large_world: their settings fit together, and the teacher is of the size they say."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from raydistill.config.distill import DistillConfig
from raydistill.config.evaluate import EvaluateConfig
from raydistill.config.load import from_command_line, load
from raydistill.config.prepare import PrepareConfig
from raydistill.config.pretrain import PretrainConfig
from raydistill.models.codec import build_tiny_codec
from raydistill.world.pretrain import build_teacher

FOLDER = Path(__file__).parents[2] / "jobs" / "large_world"
SCRIPT = (FOLDER / "run.sh").read_text(encoding="utf-8")
SCHEMAS = {
    "codec": PretrainConfig,
    "judge": PretrainConfig,
    "teacher": PretrainConfig,
    "prepare": PrepareConfig,
    "distill": DistillConfig,
    "single": DistillConfig,
    "evaluate": EvaluateConfig,
}
FILES = {name: load(schema, FOLDER / f"{name}.yaml") for name, schema in SCHEMAS.items()}


def test_every_file_is_run_once_in_order_by_the_script():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SCHEMAS)
    assert re.findall(r"^job (\w+) (\w+)", SCRIPT, re.MULTILINE) == [
        ("pretrain", "codec"),
        ("pretrain", "judge"),
        ("pretrain", "teacher"),
        ("prepare", "prepare"),
        ("distill", "distill"),
        ("distill", "single"),
        ("evaluate", "evaluate"),
    ]


def test_all_are_of_64_pixels_and_find_one_another():
    networks = {FILES[part].output for part in ("codec", "judge", "teacher")}
    (folder,) = networks
    assert {FILES[part].size for part in ("codec", "judge", "teacher", "evaluate")} == {64}
    prepare, evaluate, dual, single = (FILES[n] for n in ("prepare", "evaluate", "distill", "single"))
    assert (prepare.source.size, prepare.clip.height, prepare.clip.width) == (64, 64, 64)
    assert {prepare.encode.codec, dual.codec, single.codec, evaluate.codec} == {f"{folder}/codec"}
    assert {dual.teacher, single.teacher, evaluate.teacher} == {f"{folder}/teacher"}
    assert evaluate.judge == f"{folder}/judge"
    assert {dual.data, single.data} == {prepare.output}
    assert evaluate.students == {
        "dual": [f"{dual.output}/student"],
        "single": [f"{single.output}/student"],
    }
    assert {dual.guidance_scale, single.guidance_scale} == {evaluate.guidance_scale}


def test_the_teacher_has_tens_of_millions_of_parameters():
    """Counted without weights."""
    with torch.device("meta"):
        teacher = build_teacher(FILES["teacher"])
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    count = sum(p.numel() for p in teacher.parameters())
    assert 10e6 < count < 100e6
    said = re.search(r"([\d.]+) million parameters", (FOLDER / "teacher.yaml").read_text(encoding="utf-8"))
    assert said
    assert float(said[1]) == pytest.approx(count / 1e6, abs=0.05)


def test_the_codec_has_the_parameters_that_its_file_says():
    codec = build_tiny_codec(0, FILES["codec"].codec_width)
    said = re.search(r"([\d.]+) M parameters", (FOLDER / "codec.yaml").read_text(encoding="utf-8"))
    assert said
    assert float(said[1]) == pytest.approx(sum(p.numel() for p in codec.parameters()) / 1e6, abs=0.05)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_toys_settings_fit_and_need_no_gpu(name):
    values = {}
    for key, quoted in re.findall(r"^  (\w+)=(?:'([^']*)'|\"[^\"]*\")", SCRIPT, re.MULTILINE):
        values[key] = quoted
    for key, text in re.findall(r"^  (\w+)=\"([^\"]*)\"", SCRIPT, re.MULTILINE):
        values[key] = re.sub(r"\$(\w+)", lambda found: values[found[1]], text)
    config, _ = from_command_line(
        SCHEMAS[name], ["--config", str(FOLDER / f"{name}.yaml"), *shlex.split(values[name])]
    )
    asked = {
        PretrainConfig: lambda c: (c.device, c.precision, c.size) == ("cpu", "fp32", 64),
        PrepareConfig: lambda c: c.encode.gpus_per_actor == 0 and c.source.size == 64,
        DistillConfig: lambda c: not c.scale.use_gpu and c.engine.precision == "fp32",
        EvaluateConfig: lambda c: c.size == 64 and c.threads == 1,
    }
    assert asked[SCHEMAS[name]](config)
