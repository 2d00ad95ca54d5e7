"""Bundles: what is exported comes back, is refused if it is not as written, and says what it can be asked."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bundle_cases import CODEC, export_again, save_untrained_bundle

from raydistill.artifacts import fingerprint, tree_digest
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, StaleArtifact
from raydistill.models.codec import load_codec
from raydistill.models.text import WordVectors
from raydistill.sampler import SamplingPlan, keyed_noise, sample
from raydistill.service.bundle import CARD, read_bundle, verify_bundle
from raydistill.service.export import fit_preview, frames_at_latents
from raydistill.student import load_student, read_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return folder/tiny, beside it folder/tiny-made with its student and teacher."""
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(made, tmp_path):
    """Copy the bundle, to be damaged."""
    return shutil.copytree(made, tmp_path / "tiny")


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


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"version": 2}, ""),
        ({"colour": "blue"}, ""),
        ({"plans": {}}, ""),
        ({"shapes": [{}]}, ""),
        ({}, "preview"),
        ({}, "fps"),
    ],
)
def test_a_card_of_another_release_is_refused(bundle, changes, gone):
    values = {**json.loads((bundle / CARD).read_text()), **changes}
    values = {name: value for name, value in values.items() if name not in ("digest", gone)}
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


def test_what_distillation_fixed_cannot_be_asked_otherwise(made):
    card = replace(read_bundle(made), shift=5.0)
    card.require_same("4")
    card.require_same("4", flow_shift=5, boundary_ratio=0.6, guidance_scale=2.0)
    card.require_same("4", guidance_scale=1)
    card.require_same("2+tail", guidance_scale=2.0)
    for key, value, says in (
        ("flow_shift", 3.0, "5;"),
        ("boundary_ratio", 0.875, r"0\.6;"),
        ("guidance_scale", 5.0, "2 or 1;"),
        ("guidance_scale", float("nan"), "2 or 1;"),
    ):
        with pytest.raises(InvalidValue, match=says) as refused:
            card.require_same("4", **{key: value})
        assert refused.value.key == key
    with pytest.raises(InvalidValue, match="one expert alone"):
        replace(card, boundary=None).require_same("4", boundary_ratio=0.6)
    with pytest.raises(InvalidValue, match="2; "):  # its tail is the teacher's, with two passes a step
        card.require_same("2+tail", guidance_scale=1)


class LinearCodec:
    """Frames are a linear map of the latents, 8 times as wide; each latent frame but the first is `per`."""

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
    fit = fit_preview(load_student(made / "student"), LinearCodec(per), card, WordVectors(8, 32))
    torch.testing.assert_close(torch.tensor(fit["matrix"]), LinearCodec.matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(fit["bias"]), LinearCodec.bias, rtol=0, atol=1e-4)
    assert fit["r2"] == 1.0
    with pytest.raises(StaleArtifact, match="frames"):
        fit_preview(load_student(made / "student"), LinearCodec(2), card, WordVectors(8, 32))


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
