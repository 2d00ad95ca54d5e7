"""MCM's student as a LoRA: the teacher is never touched, a file that diffusers loads, merged as apart."""

import pytest
import torch
import unet_cases
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    WanPipeline,
)
from motion_cases import teacher as wan_teacher
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, UMT5Config, UMT5EncoderModel

from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import CorruptArtifact, MissingArtifact, StaleArtifact
from raydistill.models.lora import FILE, add_lora, load_lora, lora_state, merge, save_lora, targets_of
from raydistill.models.unet import UNetField
from raydistill.sampler import plan_lcm
from raydistill.student import Card, load_student, read_card, save_student


def field_of(kind):
    if kind == "wan":
        return wan_teacher(), (torch.randn(2, 4, 4, 4, 4), torch.randn(2, 3, 32))
    net = unet_cases.unet3d() if kind == "ms" else unet_cases.unet_motion()
    for p in net.parameters():  # nothing that is zero at first shall hide a difference
        p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return UNetField(net).eval(), unet_cases.inputs()


def shaken(student):
    """Move the branches away from where they begin."""
    rng = torch.Generator().manual_seed(3)
    for weight in lora_state(student).values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
    return student.eval()


def same(kind, ours, theirs):
    """Bit for bit; but ModelScopeT2V's convolutions over time differ by rounding from call to call."""
    if kind == "ms":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        return True
    return torch.equal(ours, theirs)


KINDS = ["wan", "ms", "ad"]
T = torch.tensor([0.9, 0.3])


@pytest.mark.parametrize("kind", KINDS)
def test_only_branches_are_trained_and_the_teacher_stays_bit_for_bit(kind):
    teacher, (x, text) = field_of(kind)
    weights = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    with torch.no_grad():
        before = teacher(x, T, text)
        student = add_lora(teacher, 2, 4.0, seed=0)
        assert same(kind, student(x, T, text), before)  # B begins at zero
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        student(x, T, text).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert same(kind, teacher(x, T, text), before)
        assert not torch.allclose(student(x, T, text), before, rtol=1e-3)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in teacher.named_parameters())
    held = {p.data_ptr() for p in teacher.parameters()}
    own = {p.data_ptr() for n, p in student.named_parameters() if ".lora_" not in n}
    assert own == held  # one copy of the weights


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_apart_up_to_rounding_and_leaves_the_teacher_alone(kind):
    teacher, (x, text) = field_of(kind)
    student = shaken(add_lora(teacher, 2, 4.0, seed=0))
    with torch.no_grad():
        apart, before = student(x, T, text), teacher(x, T, text)
        merged = merge(student)
        torch.testing.assert_close(merged(x, T, text), apart, rtol=1e-4, atol=1e-5)
        assert same(kind, teacher(x, T, text), before)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())


def test_mcms_layers_are_adapted():
    names = targets_of(unet_cases.unet3d())
    assert {name.rpartition(".")[2] for name in names} >= {
        "to_q",
        "to_k",
        "to_v",
        "conv1",
        "conv2",
        "proj_in",
    }
    assert any("temp_attentions" in name for name in names)
    assert not any("temp_convs" in name for name in names)
    motion = targets_of(unet_cases.unet_motion())
    assert any("motion_modules" in name and name.endswith("to_q") for name in motion)
    assert not any("motion_modules" in name and "proj_" in name.rpartition(".")[2] for name in motion)
    net = unet_cases.unet3d()
    assert all(isinstance(net.get_submodule(name), nn.Linear | nn.Conv2d) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind, tmp_path):
    teacher, (x, text) = field_of(kind)
    student = shaken(add_lora(teacher, 2, 4.0, seed=0))
    save_lora(student, tmp_path, 2, 4.0)
    again = load_lora(teacher, tmp_path, 2, 4.0)
    with torch.no_grad():
        assert same(kind, again(x, T, text), student(x, T, text))
    with pytest.raises(CorruptArtifact, match="rank 3"):
        load_lora(teacher, tmp_path, 3, 4.0)


class Words:
    """Stands for a tokenizer; prompts are given as embeddings."""

    model_max_length = 5


def test_wans_pipeline_loads_it_and_samples_the_same(tmp_path):
    teacher, _ = field_of("wan")
    teacher.network.register_to_config(text_dim=32)
    student = shaken(add_lora(teacher, 2, 4.0, seed=0))
    save_lora(student, tmp_path, 2, 4.0)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    fresh, _ = field_of("wan")
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes)),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=fresh.network,
    )
    pipeline.set_progress_bar_config(disable=True)
    text, noise = torch.randn(1, 3, 32), torch.randn(1, 4, 4, 4, 4)
    how = {"prompt_embeds": text, "num_frames": 13, "height": 32, "width": 32, "guidance_scale": 1.0}
    how |= {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline(latents=noise.clone(), **how).frames
    pipeline.load_lora_weights(tmp_path)
    theirs = pipeline(latents=noise.clone(), **how).frames
    pipeline.unload_lora_weights()
    pipeline.transformer = merge(student).network
    ours = pipeline(latents=noise.clone(), **how).frames
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, ours, rtol=1e-2)


def test_animatediffs_pipeline_loads_it_and_samples_the_same(tmp_path):
    teacher, _ = field_of("ad")
    student = shaken(add_lora(teacher, 2, 4.0, seed=0))
    save_lora(student, tmp_path, 2, 4.0)
    torch.manual_seed(0)
    blocks = {"block_out_channels": (4, 4), "norm_num_groups": 2}
    blocks |= {
        f"{way}_block_types": (f"{kind}Block2D",) * 2
        for way, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    fresh, _ = field_of("ad")
    pipeline = AnimateDiffPipeline(
        vae=AutoencoderKL(**blocks),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=16, **sizes)),
        tokenizer=None,
        unet=fresh.network,
        motion_adapter=None,
        scheduler=LCMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    text, noise = torch.randn(1, 5, 8), torch.randn(1, *unet_cases.SHAPE)
    how = {"prompt_embeds": text, "num_frames": 3, "height": 8, "width": 8, "guidance_scale": 1.0}
    how |= {"num_inference_steps": 4, "output_type": "latent"}

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipeline(latents=noise.clone(), generator=generator, **how).frames

    plain = run()
    pipeline.load_lora_weights(tmp_path)
    theirs = run()
    pipeline.unload_lora_weights()
    pipeline.unet = merge(student).network
    ours = run()
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    assert not torch.allclose(plain, ours, rtol=1e-2)


def card(teacher_digest=None):
    return Card(
        kind="motion",
        boundary=None,
        grid=TimeGrid(50),
        guidance_scale=2.0,
        guidance_range=(1.5, 2.5),
        schedule={
            "beta_schedule": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        },
        latent_shape=unet_cases.SHAPE,
        text_shape=unet_cases.TEXT,
        lora=(2, 4.0),
        sources={"teacher": teacher_digest} if teacher_digest else {},
    )


def test_a_motion_students_folder(tmp_path):
    path = unet_cases.save(tmp_path / "teacher", "ad")
    from raydistill.models.teacher import load_teacher

    teacher = load_teacher(path)
    student = shaken(add_lora(teacher, 2, 4.0, seed=0))
    save_student(tmp_path / "student", card(), student, None, {4: plan_lcm(4, TimeGrid(50))})
    assert (tmp_path / "student" / FILE).is_file()
    found, plans = read_card(tmp_path / "student")
    assert (found.kind, found.guidance_range, list(plans)) == ("motion", (1.5, 2.5), ["4"])
    with pytest.raises(MissingArtifact, match="is a LoRA on its teacher"):
        load_student(tmp_path / "student")
    x, text = unet_cases.inputs()
    with torch.no_grad():
        expected = student(x, T, text)
        for merged in (True, False):
            again = load_student(tmp_path / "student", path, merged=merged)
            torch.testing.assert_close(again.fields["semantic"](x, T, text), expected, rtol=1e-4, atol=1e-5)
    assert again.schedule.alphas_cumprod[0] == pytest.approx(1 - 0.00085)
    assert set(again.fields) == {"semantic", "teacher"}
    save_student(tmp_path / "other", card("another"), student, None, {4: plan_lcm(4, TimeGrid(50))})
    with pytest.raises(StaleArtifact, match="another teacher"):
        load_student(tmp_path / "other", path)
