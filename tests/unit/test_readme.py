"""What the documents say can be done: code runs, commands have settings that exist, links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from raydistill.artifacts import tree_digest
from raydistill.config.load import from_command_line
from raydistill.consistency.schedule import TimeGrid
from raydistill.models.expert import add_detail
from raydistill.models.wan import build_tiny_teacher
from raydistill.sampler import build_plan
from raydistill.student import Card, save_student

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(path for path in ROOT.glob("*/README.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = {
    "prepare": "PrepareConfig",
    "distill": "DistillConfig",
    "evaluate": "EvaluateConfig",
    "export": "ExportConfig",
    "consolidate": "ConsolidateConfig",
}
SWITCHES = {"analyse": "", "plan": "", "update-readme": ""}


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def job_commands() -> list[list[str]]:
    text = "\n".join(fences("sh") + re.findall(r"`(python jobs/[^`]+)`", README)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "jobs/" in line]
    return [words[words.index("python") + 1 :] for words in lines]


def save_untrained_student(folder: Path) -> None:
    semantic, grid = build_tiny_teacher(1, num_layers=1), TimeGrid(num_intervals=25)
    card = Card(
        kind="dual",
        boundary=0.6,
        grid=grid,
        guidance_scale=2.0,
        latent_shape=(4, 16, 4, 4),
        text_shape=(8, 32),
        lora=(2, 4.0),
        sources={"codec": tree_digest(ROOT / "raydistill" / "world" / "weights" / "codec")},
    )
    save_student(folder, card, semantic, add_detail(semantic, 2, 4.0, seed=1), {4: build_plan(4, 0.6, grid)})


def test_the_readmes_code_samples_a_clip(tmp_path, monkeypatch):
    save_untrained_student(tmp_path / "student")
    (code,) = fences("python")
    assert code.count("runs/tiny/dual/student") == code.count("runs/tiny/clip.gif") == 1
    names = {}
    monkeypatch.chdir(ROOT)
    code = code.replace("runs/tiny/dual/student", str(tmp_path / "student"))
    exec(code.replace("runs/tiny", str(tmp_path)), names)
    assert names["frames"].shape == (1, 3, 16, 32, 32)
    assert names["frames"].abs().max() <= 1
    with Image.open(tmp_path / "clip.gif") as clip:
        assert clip.n_frames == 16


@pytest.mark.parametrize("command", job_commands(), ids=" ".join)
def test_the_readmes_commands_have_settings_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    job, *arguments = command
    stage = Path(job).stem
    schema = getattr(importlib.import_module(f"raydistill.config.{stage}"), JOBS[stage])
    from_command_line(schema, arguments, switches=SWITCHES)
    given = [word.removeprefix("--") for word in arguments if word.startswith("--") and word != "--config"]
    assert all(switch in (ROOT / job).read_text(encoding="utf-8") for switch in given)


def test_there_are_commands_and_make_knows_its_targets():
    assert len(job_commands()) >= 4
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for path in DOCUMENTS:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE)) <= set(targets), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(
        r"`((?:raydistill|consistency|config|models|world|experts|tests|jobs)/[\w/.]+)`", text
    ):
        assert "NAME" in name or any((base / name).exists() for base in (ROOT, ROOT / "raydistill")), name


def test_the_readme_has_one_place_for_the_table():
    assert README.count("<!-- table:begin -->\n") == README.count("<!-- table:end -->\n") == 1
