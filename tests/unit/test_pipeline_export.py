"""Exported folders beside our sampler: diffusers alone, in a process that cannot import this package."""

import json
import subprocess
import sys

import numpy as np
import pipeline_cases
import pytest
import torch
from diffusers import WanPipeline
from einops import rearrange
from export_cases import ALPHA, CASES, RANK, save_real_student, text_length
from safetensors.torch import load_file

from raydistill.models.codec import load_codec
from raydistill.models.lora import FILE
from raydistill.models.prompts import PromptEncoder
from raydistill.models.teacher import load_whole_teacher
from raydistill.pipelines.comfyui import branches_of
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.pipelines.usage import PROMPT
from raydistill.sampler import sample
from raydistill.student import load_student

VANILLA = """
import json, os, re, sys
sys.modules["raydistill"] = None
import diffusers.utils, numpy, torch
torch.set_num_threads(1)
diffusers.utils.export_to_video = lambda frames, path, fps: None
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1]
    made = {}
    exec(code, made)
    numpy.save("made.npy", made["frames"])
    times = made["pipe"].scheduler.timesteps.tolist()
    json.dump([type(made["pipe"]).__name__, times], open("made.json", "w"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case's student, pipeline and folder, sampled by the lines of its own card."""
    made = {}
    for kind, method in CASES:
        folder = tmp_path_factory.mktemp(f"{kind}-{method}")
        student, pipeline = save_real_student(folder, kind, method)
        done = export_pipeline(student, pipeline, folder / "out", Wanted(name="small"))
        assert done.written
        made[kind, method] = student, pipeline, done
    folders = [str(done.folder) for _, _, done in made.values()]
    ran = subprocess.run([sys.executable, "-c", VANILLA, *folders], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return made


def drawn_as_the_pipeline_draws(kind, shape):
    """Noise in the order and layout in which a pipeline and its scheduler draw it from one generator."""
    generator = torch.Generator().manual_seed(0)

    def noise_at(k, _shape):
        b, c, f, h, w = shape
        if kind == "cogvideox":
            return torch.randn(b, f, c, h, w, generator=generator).transpose(1, 2)
        if kind == "modelscope" and k:
            return rearrange(
                torch.randn(b * f, c, h, w, generator=generator), "(b f) c h w -> b c f h w", b=b
            )
        return torch.randn(b, c, f, h, w, generator=generator)

    return noise_at


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_cards_lines_make_our_frames(exported, case):
    kind, _ = case
    student, pipeline, done = exported[case]
    loaded = load_student(student, pipeline)
    shape = (1, *loaded.card.latent_shape)
    noise_at = drawn_as_the_pipeline_draws(kind, shape)
    text = PromptEncoder(pipeline, text_length(kind))([PROMPT])
    plan = done.steps.plan
    noise = noise_at(0, shape)
    latents = sample(loaded.fields, loaded.schedule, plan, noise, text, noise_at=noise_at)
    with torch.no_grad():
        ours = load_codec(pipeline).decode(latents)[0] / 2 + 0.5
    theirs = torch.from_numpy(np.load(done.folder / "made.npy"))
    assert len(plan.jumps) == 4
    assert ours.std() > 0.01
    torch.testing.assert_close(rearrange(ours, "c f h w -> f h w c"), theirs, rtol=0, atol=2e-3)
    assert set(loaded.fields) >= {one.expert for one in plan.jumps}
    kind_of_pipeline, steps = json.loads((done.folder / "made.json").read_text())
    ahead = 1 if loaded.card.schedule else 0
    assert kind_of_pipeline == json.loads((done.folder / "model_index.json").read_text())["_class_name"]
    assert [(step + ahead) / 1000 for step in steps] == pytest.approx(done.steps.times, abs=1e-6)


def test_a_folder_without_an_expert_is_wans_own(exported):
    """Wan's pipeline routes by its ratio, half way between the boundary and the time above it."""
    for case in (("wan21", "dual"), ("wan22", "dual_full")):
        student, _, done = exported[case]
        index = json.loads((done.folder / "model_index.json").read_text())
        boundary = load_student(student).card.boundary
        assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
        above = min(t for t in done.steps.times if t > boundary)
        assert boundary < index["boundary_ratio"] < above
        assert boundary in done.steps.times
    index = json.loads((exported["wan21", "single"][2].folder / "model_index.json").read_text())
    assert (index["transformer_2"], index["boundary_ratio"]) == ([None, None], None)


def test_the_teachers_tail_has_the_second_networks_guidance(exported, tmp_path):
    _, pipeline, _ = exported["wan22", "dual_full"]
    student, _ = save_real_student(tmp_path, "wan22", "dual_full", pipeline, guidance_scale_2=2.5)
    loaded, pair = load_student(student, pipeline), load_whole_teacher(pipeline).requires_grad_(False)
    text, null = (PromptEncoder(pipeline)([said]) for said in (PROMPT, ""))
    x, w = pipeline_cases.latents_of("wan22", batch=1), {0.9: pipeline_cases.GUIDANCE, 0.5: 2.5}
    for t, scale in w.items():
        time = torch.tensor([t], dtype=torch.float64)
        with torch.no_grad():
            cond, uncond = (pair(x, time, one) for one in (text, null))
            torch.testing.assert_close(
                loaded.fields["teacher"](x, time, text), uncond + scale * (cond - uncond)
            )
    done = export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    assert "2.5 of the second network" in (done.folder / "README.md").read_text()


def test_comfyuis_lora_of_wan_is_read_back_by_diffusers(exported):
    """Diffusers converts what the model's own release names, and gets its own file again."""
    student, _, done = exported["wan21", "motion"]
    assert done.comfyui == done.folder / "comfyui" / "small.safetensors"
    theirs, alphas = WanPipeline.lora_state_dict(done.comfyui), load_file(done.comfyui)
    own = load_file(student / FILE)
    assert theirs.keys() == own.keys()
    a, b = "lora_A.weight", "lora_B.weight"
    for name in (n.removesuffix(a) for n in own if n.endswith(a)):
        ours = own[name + b] @ own[name + a] * ALPHA / RANK
        torch.testing.assert_close(theirs[name + b] @ theirs[name + a], ours)
    assert {float(v) for n, v in alphas.items() if n.endswith("alpha")} == {ALPHA}
    assert exported["wan21", "dual"][2].comfyui is None


def test_comfyuis_lora_of_hunyuanvideo_joins_what_its_release_has_as_one(exported):
    student, _, done = exported["hunyuan", "motion"]
    made, own = load_file(done.comfyui), branches_of(load_file(student / FILE))

    def delta(layer):
        a, b, alpha = (
            made[f"diffusion_model.{layer}.{n}"] for n in ("lora_A.weight", "lora_B.weight", "alpha")
        )
        return b @ a * alpha / len(a)

    def ours(*layers):
        return torch.cat([own[layer][1] @ own[layer][0] for layer in layers]) * ALPHA / RANK

    each = [f"attn.to_{one}" for one in "qkv"]
    refiner = "context_embedder.token_refiner.refiner_blocks.0"
    for layer, parts in {
        "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.{one}" for one in each],
        "double_blocks.0.img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.img_mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
        "double_blocks.0.img_mlp.fc2": ["transformer_blocks.0.ff.net.2"],
        "single_blocks.0.linear1": [f"single_transformer_blocks.0.{one}" for one in (*each, "proj_mlp")],
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [f"{refiner}.{one}" for one in each],
        "txt_in.individual_token_refiner.blocks.0.self_attn_proj": [f"{refiner}.attn.to_out.0"],
        "txt_in.individual_token_refiner.blocks.0.mlp.fc1": [f"{refiner}.ff.net.0.proj"],
        "txt_in.individual_token_refiner.blocks.0.mlp.fc2": [f"{refiner}.ff.net.2"],
    }.items():
        torch.testing.assert_close(delta(layer), ours(*parts))
    joined = sum(n.endswith("alpha") and ("qkv" in n or "linear1" in n) for n in made)
    alone = sum(n.endswith("alpha") for n in made) - joined
    single = sum("linear1" in n and n.endswith("alpha") for n in made)
    assert 3 * joined + single + alone == len(own)


def test_no_pickled_weight_is_copied(tmp_path):
    pipeline = pipeline_cases.save(tmp_path / "pipeline", "wan21")
    student, _ = save_real_student(tmp_path, "wan21", "motion", pipeline)
    (pipeline / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    (pipeline / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    done = export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    assert not list(done.folder.rglob("*.bin"))
    assert (done.folder / "text_encoder" / "model.safetensors").is_file()
