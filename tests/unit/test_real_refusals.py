"""Models that cannot be used, and models of the hub: said before anything is loaded."""

import json
import shutil

import pipeline_cases
import pytest
import torch
from export_cases import save_real_student

from raydistill.config.distill import DistillConfig
from raydistill.config.grid import GridConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact
from raydistill.experts.stages import require_own_networks
from raydistill.models.codec import load_codec
from raydistill.models.folders import located, network_folders, part_folder
from raydistill.models.prompts import PromptEncoder, prompts_identity
from raydistill.models.teacher import embeds_guidance, load_teacher, load_whole_teacher, require_fit
from raydistill.pipelines.folder import Wanted, export_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One of each kind that is needed; copied before it is changed."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        kind: pipeline_cases.save(folder / kind, kind) for kind in ("wan21", "wan22", "hunyuan", "cogvideox")
    }


@pytest.fixture
def wan(saved, tmp_path):
    return shutil.copytree(saved["wan21"], tmp_path / "wan")


def change(path, **values):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, **values}))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(MissingArtifact, match=r"no model at .*: name its folder"):
        load_teacher(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(MissingArtifact, match="not a pipeline's index"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(MissingArtifact, match="WanPipeline without transformer"):
        load_teacher(tmp_path)
    with pytest.raises(MissingArtifact, match="WanPipeline without its vae"):
        load_codec(tmp_path)
    with pytest.raises(MissingArtifact, match="neither of text_encoder"):
        PromptEncoder(tmp_path)


def test_a_class_that_is_not_known(wan):
    change(wan / "transformer" / "config.json", _class_name="MochiTransformer3DModel")
    with pytest.raises(MissingArtifact, match="found MochiTransformer3DModel"):
        load_teacher(wan)
    change(wan / "model_index.json", _class_name="MochiPipeline")
    with pytest.raises(MissingArtifact, match=r"encode\.text: .* is MochiPipeline"):
        prompts_identity(wan)
    change(wan / "vae" / "config.json", _class_name="AutoencoderKLMochi")
    with pytest.raises(MissingArtifact, match="holds a AutoencoderKLMochi: known codecs are"):
        load_codec(wan)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_are_never_read(wan, part):
    """The same weights under the name that diffusers and transformers would unpickle."""
    weights = next((wan / part).glob("*.safetensors"))
    old = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({}, wan / part / old)
    weights.unlink()
    read = {"transformer": load_teacher, "vae": load_codec, "text_encoder": PromptEncoder}[part]
    with pytest.raises(MissingArtifact, match=r"safetensors|no whole text encoder"):
        read(wan)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"latents_mean": [0.0] * 15}, "latents_mean = .*16 numbers"),
        ({"latents_std": [1.0] * 15 + ["x"]}, "latents_std = .*16 numbers"),
        ({"latents_std": [1.0] * 15 + [0.0]}, "above 0 in every channel"),
    ],
)
def test_wrong_latent_statistics_of_wan(wan, values, says):
    change(wan / "vae" / "config.json", **values)
    with pytest.raises(InvalidValue, match=says):
        load_codec(wan)


@pytest.mark.parametrize("scale", [0.0, -1.0, "much"])
def test_wrong_latent_statistics_of_the_others(saved, tmp_path, scale):
    folder = shutil.copytree(saved["cogvideox"], tmp_path / "cog")
    change(folder / "vae" / "config.json", scaling_factor=scale)
    with pytest.raises(InvalidValue, match=r"scaling_factor = .*a number above 0"):
        load_codec(folder)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("hunyuan", "image_condition_type", "latent_concat"), ("cogvideox", "patch_size_t", 2)],
)
def test_variants_that_want_something_else(saved, tmp_path, kind, key, value):
    folder = shutil.copytree(saved[kind], tmp_path / kind)
    change(folder / "transformer" / "config.json", **{key: value})
    with pytest.raises(InvalidValue, match=f"{key} = "):
        require_fit(folder, (16, 3, 4, 6), (10, 16))


def test_captions_of_another_length_than_positions(saved):
    require_fit(saved["cogvideox"], (16, 3, 4, 6), (10, 16))
    with pytest.raises(StaleArtifact, match="texts of 10 tokens, the data has 12"):
        require_fit(saved["cogvideox"], (16, 3, 4, 6), (12, 16))


@pytest.mark.parametrize("ratio", [None, 0.0, 1.0, "0.875"])
def test_two_networks_without_a_time_to_meet(saved, tmp_path, ratio):
    folder = shutil.copytree(saved["wan22"], tmp_path / "wan")
    change(folder / "model_index.json", boundary_ratio=ratio)
    with pytest.raises(MissingArtifact, match="boundary_ratio"):
        load_whole_teacher(folder)


def test_two_networks_meet_where_the_grid_says(saved):
    grid = GridConfig(num_intervals=50, shift=12.0)
    with pytest.raises(InvalidValue, match=r"boundary = 0\.74: 0\.8709.*second network takes over") as wrong:
        require_own_networks(DistillConfig(teacher=str(saved["wan22"]), grid=grid, experts="dual_full"))
    right = float(wrong.value.expected.split(",")[0])
    require_own_networks(
        DistillConfig(teacher=str(saved["wan22"]), grid=grid, boundary=right, experts="dual_full")
    )
    with pytest.raises(InvalidValue, match=r"guidance_scale_2 = 3\.0: 0: this teacher has one network"):
        require_own_networks(
            DistillConfig(teacher=str(saved["wan21"]), experts="dual_full", guidance_scale_2=3.0)
        )
    with pytest.raises(InvalidValue, match="experts = 'single': dual_full"):
        require_own_networks(DistillConfig(teacher=str(saved["wan22"]), grid=grid, experts="single"))


def test_a_critic_of_hidden_maps_wants_a_transformer(tmp_path):
    folder = pipeline_cases.save(tmp_path, "modelscope")
    with pytest.raises(InvalidValue, match=r"detail\.objective\.adversarial = 0\.05: 0 with a U-Net"):
        require_own_networks(DistillConfig(teacher=str(folder)))
    plain = DetailConfig(objective=ObjectiveConfig())
    require_own_networks(DistillConfig(teacher=str(folder), detail=plain))


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """The hub's cache as its own client lays it out, and no way to the hub."""
    cache = tmp_path / "cache"
    model = cache / "models--owner--wan"
    shutil.copytree(saved["wan21"], model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return model / "snapshots" / "abc"


def test_a_name_on_the_hub_is_its_snapshot(hub):
    assert located("owner/wan") == hub
    assert network_folders("owner/wan") == (hub / "transformer",)
    assert part_folder("owner/wan", "vae") == hub / "vae"
    with pytest.raises(MissingArtifact, match=r"no folder .*/owner/other, and 'owner/other' cannot be had"):
        located("owner/other")


def test_a_plan_leaves_configs_alone_in_the_hubs_cache_and_a_run_says_so(hub):
    for weights in hub.rglob("*.safetensors"):
        weights.unlink()
    assert embeds_guidance("owner/wan") is False
    with pytest.raises(MissingArtifact, match="in part, as after --plan: fetch it with HF_HUB_OFFLINE unset"):
        load_teacher("owner/wan")


def test_a_student_is_exported_over_a_name_on_the_hub(hub, tmp_path):
    """Of the snapshot what the pipeline's index names."""
    (hub / "original").mkdir()
    (hub / "original" / "whole.safetensors").write_bytes(b"x")
    student, _ = save_real_student(tmp_path, "wan21", "motion", hub)
    done = export_pipeline(student, "owner/wan", tmp_path / "out", Wanted(name="small"))
    assert "base_model: owner/wan\n" in (done.folder / "README.md").read_text()
    assert (done.folder / "vae" / "config.json").is_file()
    assert not (done.folder / "original").exists()
