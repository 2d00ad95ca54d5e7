"""Exported folders beside our sampler: diffusers alone, in a process that cannot import this package."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pipeline_cases
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from einops import rearrange
from export_cases import ALPHA, CASES, RANK, save_real_student, text_length
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from job_cases import load_job
from safetensors.torch import load_file

from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line
from raydistill.consistency.phases import split_evenly
from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import CorruptArtifact, InvalidValue, MissingArtifact, MissingValue, StaleArtifact
from raydistill.models.codec import load_codec
from raydistill.models.lora import FILE
from raydistill.models.prompts import PromptEncoder
from raydistill.models.teacher import load_whole_teacher
from raydistill.pipelines.comfyui import branches_of
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.pipelines.schedulers import fit_flow
from raydistill.pipelines.usage import PROMPT
from raydistill.sampler import build_plan, plan_lcm, plan_times, sample
from raydistill.student import load_student, read_card

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


@pytest.fixture(scope="module")
def dual(exported):
    student, pipeline, done = exported["wan21", "dual"]
    return student, pipeline, done.folder


def test_the_same_export_again_does_nothing_and_another_is_refused(dual, tmp_path):
    student, pipeline, folder = dual
    again = export_pipeline(student, pipeline, folder, Wanted(name="small"))
    assert not again.written
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(InvalidValue, match="another export is there"):
        export_pipeline(student, pipeline, copy, Wanted(name="small", plan="2"))
    (copy / "transformer" / "config.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="transformer/config"):
        export_pipeline(student, pipeline, copy, Wanted(name="small"))
    (copy / "export.json").unlink()
    with pytest.raises(InvalidValue, match="something else is there"):
        export_pipeline(student, pipeline, copy, Wanted(name="small"))


def test_a_stopped_export_leaves_nothing(dual, tmp_path, monkeypatch):
    student, pipeline, _ = dual

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("raydistill.pipelines.folder._write_index", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("2+tail", "steps of the teacher"),
        ("16", "one of 2, 2\\+tail, 4"),
        ("re", "re-noise"),
        ("1", "beyond"),
    ],
)
def test_plans_that_no_scheduler_takes(dual, tmp_path, monkeypatch, plan, says):
    student, pipeline, _ = dual
    card, plans = read_card(student)
    more = {
        "re": build_plan(4, card.boundary, card.grid, "renoise"),
        "1": build_plan(1, card.boundary, card.grid),
    }
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, plans | more))
    with pytest.raises(InvalidValue, match=says):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", plan=plan))
    assert not list(tmp_path.iterdir())


def test_deterministic_plans_of_a_u_net_are_refused(exported, tmp_path, monkeypatch):
    student, pipeline, _ = exported["modelscope", "motion"]
    card, plans = read_card(student)
    straight = {"4": plan_lcm(4, card.grid, "deterministic")}
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, straight))
    with pytest.raises(InvalidValue, match="LCM's, which re-noises"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small"))
    uneven = {"3": plan_times((1.0, 0.9, 0.3, 0.0), None, 0.001, "renoise")}
    monkeypatch.setattr("raydistill.pipelines.folder.read_card", lambda _: (card, plans | uneven))
    with pytest.raises(InvalidValue, match=r"timesteps \[999"):
        export_pipeline(student, pipeline, tmp_path / "out", Wanted(name="small", plan="3"))


def test_other_parts_than_the_students_are_refused(dual, tmp_path):
    student, pipeline, _ = dual
    with pytest.raises(MissingArtifact, match="expected the whole folder of a WanPipeline"):
        export_pipeline(student, pipeline / "transformer", tmp_path / "out", Wanted(name="small"))
    for part, says in (("vae", "another codec"), ("text_encoder", "another text encoder")):
        other = shutil.copytree(pipeline, tmp_path / part)
        config = other / part / "config.json"
        config.write_text(config.read_text() + " ")
        with pytest.raises(StaleArtifact, match=says):
            export_pipeline(student, other, tmp_path / "out", Wanted(name="small"))
    other = shutil.copytree(pipeline, tmp_path / "network")
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(StaleArtifact, match="another teacher"):
        export_pipeline(student, other, tmp_path / "out", Wanted(name="small"))
    assert not (tmp_path / "out").exists()


@given(
    semantic=st.integers(1, 4),
    detail=st.integers(1, 4),
    shift=st.floats(1.0, 20.0),
    node=st.integers(20, 40),
)
@settings(max_examples=25, deadline=None)
def test_wans_scheduler_meets_the_boundary_and_the_last_start(semantic, detail, shift, node):
    """Whatever the shift and the split: no jump crosses, and up to three steps are met whole."""
    grid = TimeGrid(50, shift=shift)
    boundary = grid.nodes[node]
    upper = split_evenly(1.0, boundary, semantic, grid)
    lower = split_evenly(boundary, 0.0, detail, grid)
    plan = plan_times((*upper, *lower[1:]), boundary)
    try:
        scheduler = fit_flow(FlowMatchEulerDiscreteScheduler, plan)
    except InvalidValue:
        assume(False)
    scheduler.set_timesteps(len(plan.jumps))
    found, wanted = scheduler.sigmas[:-1].tolist(), [one.t for one in plan.jumps]
    assert sorted(found, reverse=True) == found
    assert found[semantic] == pytest.approx(boundary, abs=1e-6)
    assert found[-1] == pytest.approx(wanted[-1], abs=1e-6)
    if len(wanted) <= 3:
        assert found == pytest.approx(wanted, abs=1e-6)


def test_the_model_card_tells_what_it_was_made_of(dual, tmp_path):
    student, pipeline, _ = dual
    run = tmp_path / "run"
    shutil.copytree(student, run / "student")
    objective = {"consistency": 1.0, "adversarial": 0.5, "motion": 0.0}
    (run / "config.yaml").write_text(json.dumps({"detail": {"objective": objective}}))
    line = {"stage": "detail", "step": 7, "loss/consistency": 0.25, "loss/adversarial": 1.5}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    figures = {"right": {"value": 0.5, "low": 0.25, "high": 0.75}}
    scores = {"4": {"num_clips": 64, "num_seeds": 1, "figures": figures}}
    wanted = Wanted(name="mine", license="apache-2.0", scores=scores)
    done = export_pipeline(run / "student", pipeline, tmp_path / "out", wanted)
    text = (done.folder / "README.md").read_text()
    about = ModelCard(text).data.to_dict()
    assert about["license"] == "apache-2.0"
    assert (about["library_name"], about["pipeline_tag"]) == ("diffusers", "text-to-video")
    card, _ = read_card(run / "student")
    for part in (
        "# mine\n",
        "DCM (arXiv 2506.03123)",
        "| detail | 7 | consistency | 1 | 0.25 |",
        "| detail | 7 | adversarial | 0.5 | 1.5 |",
        f"`{card.sources['teacher']}`",
        f"| data | `{'0' * 64}` |",
        "On 64 clips",
        "| right | 0.5 | 0.25 to 0.75 |",
        "`apache-2.0`",
        f"meet at t = {card.boundary:.6g}",
    ):
        assert part in text
    assert "| detail | 7 | motion" not in text
    plain = export_pipeline(student, pipeline, tmp_path / "plain", Wanted(name="mine"))
    text = (plain.folder / "README.md").read_text()
    for part in ("Not measured.", "Not stated by whoever exported it", "were not beside the student"):
        assert part in text


def test_the_job_says_what_it_wrote(dual, tmp_path, monkeypatch, capsys):
    student, pipeline, _ = dual
    arguments = [f"student={student}", f"teacher={pipeline}", f"pipeline={tmp_path}/mine/pipeline"]
    monkeypatch.setattr("sys.argv", ["export.py", *arguments])
    job = load_job("export")
    job.main()
    said = capsys.readouterr().out
    for part in ("mine/pipeline: WanPipeline, ", "FlowMatchEulerDiscreteScheduler, t = 1, ", "README.md\n"):
        assert part in said
    assert "the stored plan's times are 1, " in said
    assert "# mine\n" in (tmp_path / "mine" / "pipeline" / "README.md").read_text()
    job.main()
    assert "MB, was there already\n" in capsys.readouterr().out
    for said, says in ((["student=s"], "output"), (["student=s", "pipeline=p"], "teacher")):
        with pytest.raises(MissingValue, match=says):
            from_command_line(ExportConfig, said)
