"""Exported folders beside our sampler: diffusers alone, in a process that cannot import this package."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pipeline_cases
import pytest
import torch
from diffusers import WanPipeline
from einops import rearrange
from export_cases import ALPHA, CASES, PLANS, RANK, save_real_student, text_length
from safetensors.torch import load_file

from raydistill.models.codec import load_codec
from raydistill.models.lora import FILE
from raydistill.models.prompts import PromptEncoder
from raydistill.models.teacher import load_whole_teacher
from raydistill.pipelines.comfyui import branches_of
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.pipelines.usage import PROMPT
from raydistill.sampler import plan_times, sample
from raydistill.student import load_student, read_card

FLOWS = ("wan21", "wan22", "hunyuan")
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
    network = getattr(made["pipe"], "unet", None) or made["pipe"].transformer
    ready = network is made.get("first", network)
    steps = made["pipe"].scheduler.timesteps.tolist()
    json.dump([type(made["pipe"]).__name__, steps, ready], open("made.json", "w"))
    if "sigmas" in code or "set_timesteps" in code and "switch" not in code:
        timed = re.compile("times =|=times|partial|timesteps =|set_timesteps|pipe.scheduler")
        bare = [line for line in code.splitlines() if not timed.search(line)]
        exec("\\n".join(bare), made)
        numpy.save("bare.npy", made["frames"])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case's student, pipeline and folder, sampled by the lines of its own card."""
    made = {}
    for kind, method in CASES:
        folder = tmp_path_factory.mktemp(f"{kind}-{method}")
        student, pipeline = save_real_student(folder, kind, method)
        wanted = Wanted(name="small", plan=PLANS.get((kind, method), ""))
        done = export_pipeline(student, pipeline, folder / "out", wanted)
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


def decoded(pipeline, latents):
    """Frames as a pipeline gives them: (f, h, w, 3) in [0, 1]."""
    with torch.no_grad():
        return rearrange(load_codec(pipeline).decode(latents)[0] / 2 + 0.5, "c f h w -> f h w c")


def ours(case, made, plan):
    """Frames of our own sampler."""
    student, pipeline, _ = made
    loaded = load_student(student, pipeline)
    shape = (1, *loaded.card.latent_shape)
    noise_at = drawn_as_the_pipeline_draws(case[0], shape)
    text = PromptEncoder(pipeline, text_length(case[0]))([PROMPT])
    noise = noise_at(0, shape)
    latents = sample(loaded.fields, loaded.schedule, plan, noise, text, noise_at=noise_at)
    return decoded(pipeline, latents)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_cards_lines_make_the_frames_of_the_stored_plan(exported, case):
    student, _, done = exported[case]
    card, plans = read_card(student)
    plan = plans[PLANS.get(case, "4")]
    if plan.path == "renoise":  # the schedulers noise predicted data; training's jumps end at `last`
        plan = replace(plan, last=0.0)
    frames = ours(case, exported[case], plan)
    theirs = torch.from_numpy(np.load(done.folder / "made.npy"))
    assert frames.std() > 0.01
    torch.testing.assert_close(frames, theirs, rtol=0, atol=2e-3)
    kind, steps, ready = json.loads((done.folder / "made.json").read_text())
    assert kind == json.loads((done.folder / "model_index.json").read_text())["_class_name"]
    ahead = 1 if card.schedule else 0
    assert [(step + ahead) / 1000 for step in steps] == pytest.approx([one.t for one in plan.jumps], abs=1e-6)
    assert ready, "the next call starts with the second expert"


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in FLOWS], ids="-".join)
def test_the_scheduler_alone_has_the_boundary_and_near_times(exported, case):
    student, _, done = exported[case]
    card, plans = read_card(student)
    stored = [one.t for one in plans["4"].jumps]
    times = [card.boundary if abs(t - (card.boundary or 0)) < 1e-6 else t for t in done.steps.bare]
    if case[0] != "hunyuan":  # whose own even steps end too early for these
        assert times[-1] == pytest.approx(stored[-1], abs=1e-6)
        assert card.boundary in (None, *times)
        assert max(abs(a - b) for a, b in zip(times, stored, strict=True)) < 0.05
        path = done.steps.plan.path
        frames = ours(case, exported[case], plan_times((*times, 0.0), card.boundary, 0.0, path))
        theirs = torch.from_numpy(np.load(done.folder / "bare.npy"))
        torch.testing.assert_close(frames, theirs, rtol=0, atol=2e-3)


def test_a_u_nets_scheduler_alone_goes_straight_in_even_steps(exported):
    case = ("modelscope", "single")
    done = exported[case][2]
    assert done.steps.bare == (1.0, 0.75, 0.5, 0.25) != done.steps.times
    frames = ours(case, exported[case], plan_times((*done.steps.bare, 0.0), None))
    theirs = torch.from_numpy(np.load(done.folder / "bare.npy"))
    torch.testing.assert_close(frames, theirs, rtol=0, atol=2e-3)
    assert np.abs(theirs.numpy() - np.load(done.folder / "made.npy")).max() > 2e-3


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
        assert index["boundary_ratio"] <= min(t for t in done.steps.bare if t > boundary + 1e-6)
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
