"""A motion student as others use it: its folder, and diffusers' own pipelines with its LoRA."""

import json

import pytest
import torch
import unet_cases
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TextToVideoSDPipeline,
    WanPipeline,
)
from lora_cases import ALPHA, RANK, T, field_of, student_of
from transformers import CLIPTextConfig, CLIPTextModel, UMT5Config, UMT5EncoderModel

from raydistill.artifacts import fingerprint, tree_digest
from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid, VariancePreserving
from raydistill.consistency.solver import solve
from raydistill.errors import MissingArtifact, StaleArtifact
from raydistill.models.lora import FILE, merge, save_lora
from raydistill.models.teacher import load_teacher, read_schedule
from raydistill.sampler import plan_lcm, sample
from raydistill.student import Card, load_student, read_card, save_student

GRID = TimeGrid(50)
PLAN = plan_lcm(4, GRID)


def test_wans_pipeline_loads_it_and_samples_the_same(tmp_path):
    teacher, _ = field_of("wan")
    student = student_of(teacher)
    save_lora(student, tmp_path, RANK, ALPHA)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes)),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=field_of("wan")[0].network,
    )
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    text, noise = torch.randn(1, 3, 32), torch.randn(1, 4, 4, 4, 4)
    how = {"prompt_embeds": text, "num_frames": 13, "height": 32, "width": 32, "guidance_scale": 1.0}
    theirs = pipeline(latents=noise, num_inference_steps=3, output_type="latent", **how).frames
    times = pipeline.scheduler.sigmas.double()
    with torch.no_grad():
        ours, plain = (solve(RECTIFIED_FLOW, net, noise, times, text) for net in (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, ours, rtol=1e-2, atol=1e-2)


def image_pipeline(kind, unet):
    """A pipeline of diffusers with stand-ins for what is not asked: text encoder and VAE."""
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2}
    blocks["down_block_types"], blocks["up_block_types"] = (
        ("DownEncoderBlock2D",) * 2,
        ("UpDecoderBlock2D",) * 2,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    parts = {
        "vae": AutoencoderKL(**blocks),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=16, **sizes)),
        "tokenizer": None,
        "unet": unet,
        "scheduler": LCMScheduler.from_config(unet_cases.scheduler(kind).config),
    }
    if kind == "ms":
        pipeline = TextToVideoSDPipeline(**parts)
    else:
        pipeline = AnimateDiffPipeline(motion_adapter=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(pipeline, kind, fields):
    """Four steps of LCM by a pipeline and by our sampler on each field, from the same noise."""
    rng = torch.Generator().manual_seed(4)
    text, noise = (
        torch.randn(1, *unet_cases.TEXT, generator=rng),
        torch.randn(1, *unet_cases.SHAPE, generator=rng),
    )
    size = {"num_frames": 3, "height": 8, "width": 8, "guidance_scale": 1.0, "num_inference_steps": 4}
    at = torch.Generator().manual_seed(5)
    theirs = pipeline(latents=noise, prompt_embeds=text, generator=at, output_type="latent", **size).frames
    at.manual_seed(5)
    _, c, f, h, w = noise.shape
    frames_first = (1, f, c, h, w) if kind == "ms" else (1, c, f, h, w)  # as the pipeline hands them on
    drawn = [torch.randn(frames_first, generator=at) for _ in range(4)]
    drawn = [one.transpose(1, 2) if kind == "ms" else one for one in drawn]
    make = {"ms": VariancePreserving.scaled_linear, "ad": VariancePreserving.linear}[kind]
    ours = [
        sample({"semantic": one}, make(), PLAN, noise, text, noise_at=lambda k, _: drawn[k - 1])
        for one in fields
    ]
    return theirs, *ours


def test_animatediffs_pipeline_loads_it_and_samples_the_same(tmp_path):
    teacher, _ = field_of("ad")
    student = student_of(teacher)
    save_lora(student, tmp_path, RANK, ALPHA)
    pipeline = image_pipeline("ad", field_of("ad")[0].network)
    pipeline.load_lora_weights(tmp_path)
    theirs, ours, plain = both(pipeline, "ad", (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    assert not torch.allclose(plain, ours, rtol=1e-2, atol=1e-2 * float(ours.abs().max()))


def test_modelscopes_pipeline_samples_the_same_with_the_merged_network():
    """Its class in diffusers loads no LoRA, so the merged network takes the U-Net's place."""
    teacher, _ = field_of("ms")
    student = student_of(teacher)
    pipeline = image_pipeline("ms", merge(student_of(teacher)).network)
    theirs, ours, plain = both(pipeline, "ms", (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    assert not torch.allclose(plain, ours, rtol=1e-2, atol=1e-2 * float(ours.abs().max()))


def card(teacher):
    return Card(
        kind="motion",
        boundary=None,
        grid=GRID,
        guidance_scale=2.0,
        guidance_range=(1.5, 2.5),
        schedule=read_schedule(teacher),
        latent_shape=unet_cases.SHAPE,
        text_shape=unet_cases.TEXT,
        lora=(RANK, ALPHA),
        sources={"teacher": tree_digest(teacher)},
    )


def test_a_motion_students_folder_is_a_lora_on_one_teacher(tmp_path):
    path = unet_cases.save(tmp_path / "teacher", "ad")
    student, folder = student_of(load_teacher(path)), tmp_path / "student"
    save_student(folder, card(path), student, None, {4: PLAN})
    assert sorted(one.name for one in folder.iterdir()) == sorted([FILE, "student.json"])
    assert read_card(folder) == (card(path), {"4": PLAN})
    with pytest.raises(MissingArtifact, match="is a LoRA on its teacher"):
        load_student(folder)
    x, text = unet_cases.inputs()
    with torch.no_grad():
        expected = student(x, T, text)
        for merged, rounding in ((True, 1e-5), (False, 0.0)):
            again = load_student(folder, path, merged=merged)
            found = again.fields["semantic"](x, T, text)
            torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    assert again.schedule == VariancePreserving.linear()
    assert set(again.fields) == {"semantic", "teacher"}
    config = path / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(StaleArtifact, match="another teacher"):
        load_student(folder, path)


def test_a_card_from_before_motion_students_still_loads(tmp_path):
    teacher, _ = field_of("wan")
    old = Card(
        kind="single",
        boundary=None,
        grid=GRID,
        guidance_scale=2.0,
        latent_shape=(4, 4, 4, 4),
        text_shape=(3, 32),
    )
    save_student(tmp_path, old, teacher, None, {4: PLAN})
    written = tmp_path / "student.json"
    values = json.loads(written.read_text())
    for name in ("schedule", "guidance_range", "checksum"):
        del values[name]
    written.write_text(json.dumps({**values, "checksum": fingerprint(values)}))
    student = load_student(tmp_path)
    assert (student.card, student.schedule) == (old, RECTIFIED_FLOW)
