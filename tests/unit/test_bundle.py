"""Bundles: what is exported comes back, is refused when it is not as written, and says what it can be asked."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundle_cases import CODEC, save_untrained_bundle, save_untrained_student
from evaluate_cases import NULL_TEXT
from job_cases import load_job

from raydistill.artifacts import fingerprint, tree_digest
from raydistill.config.evaluate import EvaluateConfig, LatencyConfig, PicturesConfig
from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, MissingValue, StaleArtifact
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import build_lineup
from raydistill.models.codec import load_codec
from raydistill.models.text import WordVectors
from raydistill.sampler import SamplingPlan, keyed_noise, sample
from raydistill.service import export
from raydistill.service.bundle import CARD, read_bundle, verify_bundle
from raydistill.service.export import export_bundle, fit_preview, frames_at_latents
from raydistill.student import load_student, read_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return folder/tiny, beside it folder/tiny-made with its student and teacher."""
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(made, tmp_path):
    """Copy the bundle, to be damaged."""
    return shutil.copytree(made, tmp_path / "tiny")


def sources_of(made):
    return made.with_name("tiny-made") / "student", made.with_name("tiny-made") / "teacher"


def export_again(made, output, **changes):
    student, teacher = sources_of(made)
    return export_bundle(student, CODEC, output, **{"name": "tiny", "fps": 8, "teacher": teacher, **changes})


@pytest.mark.parametrize("kind", ["dual", "single", "dual_full", "motion"])
def test_what_was_exported_can_be_sampled_from_the_bundle_alone(tmp_path, kind):
    folder = save_untrained_bundle(tmp_path, "k", kind, fps=12)
    student = tmp_path / "k-made" / "student"
    card = verify_bundle(folder)
    two = kind in ("dual", "dual_full")
    assert (card.name, card.kind, card.fps, card.default_plan, card.steps) == (
        "k",
        kind,
        12,
        "4",
        (1, 2, 4, 8),
    )
    assert list(card.plans) == ["1", "2", "4", "8", *(["2+tail"] if two else [])]
    assert (card.boundary, card.shift, card.guidance_scale) == (0.6 if two else None, 1.0, 2.0)
    assert card.has_teacher == (folder / "teacher").is_dir() == (kind != "single")
    (shape,) = card.shapes
    assert (shape.frames, shape.height, shape.width, shape.latent) == (16, 32, 32, (4, 16, 4, 4))
    assert card.text == WordVectors(8, 32).identity
    assert card.codec_kind == "AutoencoderTiny"
    assert card.sources == {**read_card(student)[0].sources, "student": tree_digest(student)}
    shutil.move(tmp_path / "k-made", tmp_path / "gone")
    loaded = load_student(folder / "student", folder / "teacher" if card.has_teacher else None)
    loaded.require_codec(folder / "codec")
    original = load_student(tmp_path / "gone" / "student", tmp_path / "gone" / "teacher")
    assert {
        name: SamplingPlan.from_dict(plan.to_dict()) for name, plan in card.plans.items()
    } == original.plans
    noise, text = torch.randn(1, *shape.latent), WordVectors(8, 32)(["a red square"])
    for name in ("2", "2+tail") if two else ("4",):
        a, b = (sample(one.fields, one.schedule, one.plan(name), noise, text) for one in (loaded, original))
        assert torch.equal(a, b)


def test_plans_say_what_they_cost_and_whose_they_are(made):
    plans = read_bundle(made).plans
    about = {name: (plan.num_steps, plan.passes, plan.experts) for name, plan in plans.items()}
    assert about == {
        "1": (1, 1, ("semantic",)),
        "2": (2, 2, ("semantic", "detail")),
        "4": (4, 4, ("semantic", "detail")),
        "8": (8, 8, ("semantic", "detail")),
        "2+tail": (8, 2 + 2 * 6, ("semantic", "teacher")),
    }
    assert plans["1"].jumps == [{"t": 1.0, "s": 0.0, "expert": "semantic", "extrapolates": True}]


def test_a_card_and_its_files_are_read_without_torch(made):
    code = (
        "import sys; from raydistill.service.bundle import verify_bundle\n"
        "card = verify_bundle(sys.argv[1])\n"
        "print(card.digest, sorted({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{read_bundle(made).digest} []\n"


def test_a_changed_a_missing_and_an_additional_file_are_named(bundle):
    weights = bundle / "student" / "detail.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (bundle / "codec" / "latents.json").unlink()
    (bundle / "teacher" / "more.bin").write_bytes(b"?")
    read_bundle(bundle)
    with pytest.raises(CorruptArtifact) as told:
        verify_bundle(bundle)
    for part in (
        "missing: codec/latents.json;",
        "changed: student/detail.safetensors;",
        "not the bundle's: teacher/more.bin)",
    ):
        assert part in str(told.value)


def test_a_changed_cut_or_missing_card_is_refused(bundle):
    path = bundle / CARD
    text = path.read_text()
    for right, wrong in (
        ('"fps": 8', '"fps": 9'),
        ('"t": 0.8', '"t": 0.9'),
        ('"name": "tiny"', '"name": "t"'),
    ):
        assert right in text
        path.write_text(text.replace(right, wrong))
        with pytest.raises(CorruptArtifact, match="its own digest"):
            read_bundle(bundle)
    for cut in ("", text[: len(text) // 2], "[]", "{}"):
        path.write_text(cut)
        with pytest.raises(CorruptArtifact, match="not a whole card"):
            read_bundle(bundle)
    path.unlink()
    with pytest.raises(MissingArtifact, match="writes it last"):
        read_bundle(bundle)


@pytest.mark.parametrize("changes", [{"version": 2}, {"colour": "blue"}, {"plans": {}}, {"shapes": [{}]}])
def test_a_card_of_another_release_is_refused(bundle, changes):
    values = {**json.loads((bundle / CARD).read_text()), **changes}
    del values["digest"]
    (bundle / CARD).write_text(json.dumps({**values, "digest": fingerprint(values)}))
    with pytest.raises(StaleArtifact, match="export again"):
        read_bundle(bundle)


def test_the_digest_is_of_files_and_card(made, tmp_path):
    digest = read_bundle(made).digest
    assert read_bundle(made).label == f"tiny@{digest[:12]}"
    other = save_untrained_bundle(tmp_path, seed=7)
    assert read_bundle(other).digest != digest
    assert replace(read_bundle(made), fps=9).digest != digest


def test_plans_are_asked_for_by_steps_or_name(made):
    card = read_bundle(made)
    assert card.plan_for() == "4"
    assert card.plan_for(8) == "8"
    assert card.plan_for(plan="2+tail") == card.plan_for(8, "2+tail") == "2+tail"
    for asked, key, says in (
        ((3,), "num_inference_steps", "one of 1, 2, 4, 8"),
        ((2, "4"), "num_inference_steps", "plan '4' has 4 steps"),
        ((None, "3"), "plan", r"one of 1, 2, 4, 8, 2\+tail"),
    ):
        with pytest.raises(InvalidValue, match=says) as refused:
            card.plan_for(*asked)
        assert refused.value.key == key


def test_sizes_are_those_listed(made, tmp_path):
    card = export_again(made, tmp_path / "more", sizes=[(32, 32, 32), (16, 32, 64), (16, 32, 32)]).card
    assert [str(one) for one in card.shapes] == [
        "32x32 with 16 frames",
        "32x32 with 32 frames",
        "64x32 with 16 frames",
    ]
    assert card.shapes[2].latent == (4, 16, 4, 8)
    assert card.shape_for() == card.shape_for(16, 32, 32) == card.shapes[0]
    assert card.shape_for(frames=32) == card.shapes[1]
    assert card.shape_for(width=64) == card.shapes[2]
    for asked, key, says in (
        ((16, 64, 64), "size", "one of 32x32, 64x32"),
        ((17, 32, 32), "num_frames", "one of 16, 32 at 32x32"),
        ((32, 32, 64), "num_frames", "one of 16 at 64x32"),
    ):
        with pytest.raises(InvalidValue, match=says) as refused:
            card.shape_for(*asked)
        assert refused.value.key == key


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


def test_what_distillation_fixed_cannot_be_asked_otherwise(made):
    card = replace(read_bundle(made), shift=5.0)
    card.require_same()
    card.require_same(flow_shift=5, boundary_ratio=0.6, guidance_scale=2.0)
    card.require_same(guidance_scale=1)
    for key, value, says in (
        ("flow_shift", 3.0, "5;"),
        ("boundary_ratio", 0.875, r"0\.6;"),
        ("guidance_scale", 5.0, "1 or 2;"),
        ("guidance_scale", float("nan"), "1 or 2;"),
    ):
        with pytest.raises(InvalidValue, match=says) as refused:
            card.require_same(**{key: value})
        assert refused.value.key == key
    with pytest.raises(InvalidValue, match="one expert alone"):
        replace(card, boundary=None).require_same(boundary_ratio=0.6)


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


class LinearCodec:
    """Frames are a linear map of the latents, eight times as wide; each latent frame but the first is `per`."""

    matrix = torch.tensor([[0.1, 0.0, -0.1], [0.0, 0.2, 0.0], [0.05, 0.0, 0.0], [0.0, -0.1, 0.1]])
    bias = torch.tensor([0.1, -0.2, 0.3])

    def __init__(self, per):
        self.per = per

    def decode(self, latents):
        rgb = torch.einsum("bcfhw,ck->bkfhw", latents, self.matrix) + self.bias.view(1, 3, 1, 1, 1)
        rgb = torch.cat([rgb[:, :, :1], rgb[:, :, 1:].repeat_interleave(self.per, 2)], dim=2)
        return rgb.repeat_interleave(8, 3).repeat_interleave(8, 4)


@pytest.mark.parametrize(("per", "frames"), [(1, 16), (4, 61)])
def test_previews_of_a_linear_codec_are_exact(made, per, frames):
    card = read_bundle(made)
    card = replace(card, shapes=(replace(card.shapes[0], frames=frames),))
    fit = fit_preview(load_student(made / "student"), LinearCodec(per), card)
    torch.testing.assert_close(torch.tensor(fit["matrix"]), LinearCodec.matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(fit["bias"]), LinearCodec.bias, rtol=0, atol=1e-4)
    assert fit["r2"] == 1.0
    with pytest.raises(StaleArtifact, match="frames"):
        fit_preview(load_student(made / "student"), LinearCodec(2), card)


def test_previews_show_what_the_codec_would_show(made):
    """On a clip that they were not fitted to."""
    card, student = read_bundle(made), load_student(made / "student")
    noise_at = keyed_noise(1, torch.tensor([5]))
    text = WordVectors()(["a yellow circle moves slowly up over a plain background"])
    latents = sample(student.fields, student.schedule, student.plan(8), noise_at(0, (1, 4, 16, 4, 4)), text)
    with torch.no_grad():
        frames = frames_at_latents(load_codec(CODEC).decode(latents), card.shapes[0].latent)
    matrix, bias = (torch.tensor(card.preview[name]) for name in ("matrix", "bias"))
    shown = torch.einsum("bcfhw,ck->bkfhw", latents, matrix) + bias.view(1, 3, 1, 1, 1)
    spread = (frames - frames.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
    r2 = 1 - (shown - frames).square().sum() / spread
    assert (matrix.shape, bias.shape) == ((4, 3), (3,))
    assert r2 > 0.3
    assert abs(r2 - card.preview["r2"]) < 0.15


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


def test_scores_of_another_student_are_refused(made, evaluation, tmp_path):
    other = save_untrained_student(tmp_path / "other", seed=9)
    given = {"name": "b", "fps": 8}
    with pytest.raises(StaleArtifact, match="did not measure this student"):
        export_bundle(other, CODEC, tmp_path / "b", scores=evaluation, **given)
    with pytest.raises(StaleArtifact, match="did not measure a plan"):
        results = json.loads((evaluation / "results.json").read_text())
        results["rows"] = [row for row in results["rows"] if row["label"] == "mine 2 renoise"]
        (tmp_path / "results.json").write_text(json.dumps(results))
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
