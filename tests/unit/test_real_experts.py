"""Experts over every real network: published counts, step 0, freezing, saving, loading by diffusers."""

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from pipeline_cases import GUIDANCE, KINDS, PROMPTS, build, latents_of, save

from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import MissingArtifact
from raydistill.models.cogvideox import CogVideoXField
from raydistill.models.expert import DualExpert, add_detail, own_state
from raydistill.models.folders import teacher_digest
from raydistill.models.hunyuan import HunyuanField
from raydistill.models.lora import FILE, add_lora, load_lora, merge, save_lora
from raydistill.models.prompts import PromptEncoder
from raydistill.models.teacher import KINDS as NETWORKS
from raydistill.models.teacher import load_teacher, read_schedule
from raydistill.models.wan import WanField
from raydistill.sampler import build_plan, sample
from raydistill.student import Card, load_student, save_student

T = torch.tensor([0.9, 0.3], dtype=torch.float64)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    text = PromptEncoder(folder, 10 if request.param == "cogvideox" else 0)(PROMPTS)
    return request.param, folder, (latents_of(request.param), T, text)


def trained(field, seed=3):
    """Move what a student trains, as a training would."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in field.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return field.requires_grad_(False)


def test_the_detail_expert_is_the_semantic_one_at_step_0_and_never_changes_it(case):
    _, folder, inputs = case
    semantic = load_teacher(folder, guidance_scale=GUIDANCE).requires_grad_(False)
    with torch.no_grad():
        before = semantic(*inputs)
        detail = add_detail(semantic, 2, 4.0, seed=3)
        assert torch.equal(detail(*inputs), before)
    names = {n for n, p in detail.named_parameters() if p.requires_grad}
    assert names == {n for n in own_state(detail) if n in dict(detail.named_parameters())}
    assert any(".lora_" in n for n in names)
    assert any(".lora_" not in n for n in names)
    detail(*inputs).square().mean().backward()
    assert {n for n, p in detail.named_parameters() if p.grad is not None} == names
    trained(detail)
    with torch.no_grad():
        after = detail(*inputs)
        assert torch.equal(semantic(*inputs), before)
        assert not torch.allclose(after, before)
        mixed = DualExpert(semantic, detail, 0.5)(*inputs)
        torch.testing.assert_close(mixed, torch.stack([before[0], after[1]]), **CLOSE)
        torch.testing.assert_close(merge(detail)(*inputs), after, **CLOSE)
        assert torch.equal(semantic(*inputs), before)


def test_a_detail_expert_stands_on_a_semantic_lora(case):
    _, folder, inputs = case
    teacher = load_teacher(folder, guidance_scale=GUIDANCE)
    semantic = trained(add_lora(teacher, 2, 4.0, seed=1)).requires_grad_(False)
    with torch.no_grad():
        base, before = teacher(*inputs), semantic(*inputs)
        assert not torch.allclose(base, before)
        detail = add_detail(semantic, 2, 4.0, seed=3)
        assert torch.equal(detail(*inputs), before)
    assert not any(p.requires_grad for n, p in detail.named_parameters() if ".motion." in n)
    trained(detail)
    with torch.no_grad():
        after = detail(*inputs)
        assert not torch.allclose(after, before)
        assert torch.equal(semantic(*inputs), before)
        assert torch.equal(teacher(*inputs), base)
        torch.testing.assert_close(merge(detail)(*inputs), after, **CLOSE)
        torch.testing.assert_close(merge(semantic)(*inputs), before, **CLOSE)
        assert torch.equal(teacher(*inputs), base)


def test_a_lora_is_loaded_by_its_own_pipeline(case, tmp_path):
    kind, folder, inputs = case
    if kind == "modelscope":
        pytest.skip("its pipeline loads no LoRA; merged it is compared in test_student_motion.py")
    teacher = load_teacher(folder, guidance_scale=GUIDANCE).requires_grad_(False)
    student = trained(add_lora(teacher, 2, 4.0, seed=1)).requires_grad_(False)
    save_lora(student, tmp_path, 2, 4.0)
    pipeline = build(kind)
    pipeline.load_lora_weights(tmp_path)
    net = pipeline.unet if kind == "animatediff" else pipeline.transformer
    field = NETWORKS[type(net).__name__][1](net.eval())
    field.guidance = GUIDANCE
    with torch.no_grad():
        torch.testing.assert_close(field(*inputs), student(*inputs), **CLOSE)
        again = load_lora(teacher, tmp_path, 2, 4.0)
        assert torch.equal(again(*inputs), student(*inputs))


@pytest.mark.parametrize("form", ["full", "lora", "two networks"])
def test_a_student_samples_the_same_after_saving_and_loading(case, tmp_path, form):
    kind, folder, (x, _, text) = case
    grid, how = TimeGrid(10), {"guidance_scale": GUIDANCE}
    teacher = load_teacher(folder, **how).requires_grad_(False)
    boundary = grid.snap(0.5)
    semantic = trained(load_teacher(folder, **how) if form != "lora" else add_lora(teacher, 2, 4.0, seed=1))
    if form == "two networks":
        detail = trained(load_teacher(folder, "detail", **how), seed=5).requires_grad_(False)
    else:
        detail = trained(add_detail(semantic.requires_grad_(False), 2, 4.0, seed=2))
    lora = (2, 4.0)
    card = Card(
        kind="dual_full" if form == "two networks" else "dual",
        boundary=boundary,
        grid=grid,
        guidance_scale=GUIDANCE,
        schedule=read_schedule(folder),
        latent_shape=tuple(x.shape[1:]),
        text_shape=tuple(text.shape[1:]),
        lora=None if form == "two networks" else lora,
        semantic_lora=lora if form == "lora" else None,
        sources={"teacher": teacher_digest(folder)},
    )
    plan, null = build_plan(2, boundary, grid), text[0]
    save_student(tmp_path / "s", card, semantic, detail, {2: plan}, null)
    assert (tmp_path / "s" / FILE).is_file() == (form == "lora")
    if form == "lora":
        with pytest.raises(MissingArtifact, match="LoRA on its teacher"):
            load_student(tmp_path / "s")
    loaded = load_student(tmp_path / "s", folder, merged=False)
    experts = {"semantic": semantic, "detail": detail}
    ours, theirs = (sample(f, loaded.schedule, plan, x, text) for f in (experts, loaded.fields))
    assert torch.equal(ours, theirs)
    merged = load_student(tmp_path / "s", folder)
    torch.testing.assert_close(sample(merged.fields, merged.schedule, plan, x, text), ours, **CLOSE)
    with torch.no_grad():  # guided by the null text that was saved
        plain = merged.fields["teacher"](x, T, text)
    assert kind == "hunyuan" or not torch.allclose(plain, teacher(x, T, text))


SIZES = {
    "wan 1.3b": (
        lambda: WanField(
            WanTransformer3DModel(
                num_attention_heads=12, num_layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256
            )
        ),
        (1419.0, 94.4, 25.7, 240),
    ),
    "wan 14b": (
        lambda: WanField(
            WanTransformer3DModel(
                num_attention_heads=40, num_layers=40, ffn_dim=13824, text_dim=4096, freq_dim=256
            )
        ),
        (14288.5, 419.4, 232.4, 320),
    ),
    "hunyuanvideo": (lambda: HunyuanField(HunyuanVideoTransformer3DModel()), (12821.0, 163.6, 51.3, 208)),
    "cogvideox 2b": (lambda: CogVideoXField(CogVideoXTransformer3DModel()), (1693.8, 59.0, 3.3, 120)),
}


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_those_of_the_published_sizes(name):
    """In millions: network, LoRA of rank 128, copied layers; and how many layers are adapted.

    By hand from layer sizes. DCM's are Wan 1.3B, 120.0 in all, and HunyuanVideo, 214.9."""
    make, expected = SIZES[name]
    with torch.device("meta"):
        detail = add_detail(make(), 128, 256.0, seed=0)
    own = {name: weight.numel() for name, weight in own_state(detail).items()}
    base = sum(p.numel() for n, p in detail.named_parameters() if ".lora_" not in n)
    lora = sum(count for n, count in own.items() if ".lora_" in n)
    millions = [round(count / 1e6, 1) for count in (base, lora, sum(own.values()) - lora)]
    assert (*millions, sum(".lora_A." in n for n in own)) == expected
