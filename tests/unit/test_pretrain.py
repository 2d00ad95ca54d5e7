"""Training the small world's own networks: a stop changes nothing, what is done is not done again."""

from dataclasses import replace

import pytest
import torch
from job_cases import load_job
from safetensors.torch import load_file

from raydistill.config.pretrain import PretrainConfig
from raydistill.errors import InvalidValue, StaleArtifact
from raydistill.models.codec import build_tiny_codec, load_codec
from raydistill.models.judge import load_judge
from raydistill.models.teacher import load_teacher
from raydistill.models.wan import build_tiny_teacher
from raydistill.world import sprites
from raydistill.world.pretrain import draw_chunks, draw_clips, pretrain, to_float


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    build_tiny_codec(0, width=8).save(folder / "codec")
    made = {"part": "teacher", "codec": str(folder / "codec"), "output": str(folder / "whole")}
    return PretrainConfig(**made, num_steps=3, batch=2, num_clips=4, threads=1, save_every=1)


def weights(config):
    return load_file(f"{config.output}/teacher/diffusion_pytorch_model.safetensors")


def test_training_may_begin_at_a_teacher_that_is_there(config, tmp_path):
    first = build_tiny_teacher(5)
    first.transformer.save_pretrained(tmp_path / "first")
    still = replace(config, start=f"{tmp_path}/first", output=str(tmp_path), num_steps=1, learning_rate=0.0)
    pretrain(replace(still, muon_rate=0.0), lambda _: None)
    torch.testing.assert_close(weights(still), dict(first.transformer.state_dict()), rtol=0, atol=0)


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_ends_with_the_same_weights(config, tmp_path):
    said = []
    pretrain(config, said.append)
    assert "step 3/3" in said[-1]

    def stop(line):
        if "step 2/3" in line:
            raise StoppedError

    again = replace(config, output=str(tmp_path))
    with pytest.raises(StoppedError):
        pretrain(again, stop)
    pretrain(again, said.append)
    assert len(said) == 3 + 3 + 5  # clips, latents, parameters and steps 1, 2, 3; then from step 1 on
    torch.testing.assert_close(weights(again), weights(config), rtol=0, atol=0)
    said.clear()
    pretrain(again, said.append)
    assert said == [f"{tmp_path}/teacher is done: 3 steps"]


def test_settings_of_another_run_are_refused(config, tmp_path, monkeypatch):
    job = load_job("pretrain")
    given = [f"{key}={getattr(config, key)}" for key in ("part", "codec", "batch", "num_clips", "threads")]
    command = ["pretrain.py", *given, f"output={tmp_path}", "num_steps=1"]
    monkeypatch.setattr("sys.argv", command)
    job.main()
    monkeypatch.setattr("sys.argv", [*command, "save_every=7"])
    job.main()
    monkeypatch.setattr("sys.argv", [*command, "severities=[1]"])
    with pytest.raises(StaleArtifact, match=r"teacher\.yaml"):
        job.main()


SMALL = {"num_layers": 2, "num_heads": 2, "dim_head": 12, "ffn_dim": 40, "codec_width": 8}
"""Of networks for 64 pixels that train in no time."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Settings for 64 pixels, and a codec trained with them."""
    folder = str(tmp_path_factory.mktemp("large"))
    made = PretrainConfig(
        part="codec",
        output=folder,
        size=64,
        num_steps=2,
        batch=2,
        num_clips=5,
        threads=1,
        save_every=1,
        **SMALL,
    )
    pretrain(made, lambda _: None)
    return replace(made, codec=f"{folder}/codec", num_steps=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_of_64_pixels_has_the_sizes_asked_for_and_resumes(large, tmp_path, precision):
    whole = replace(large, part="teacher", output=str(tmp_path / "whole"), precision=precision)
    said = []
    pretrain(whole, said.append)
    teacher = load_teacher(f"{whole.output}/teacher")
    config = teacher.transformer.config
    made = {n: config[n] for n in ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim")}
    assert list(made.values()) == [2, 2, 12, 40]
    count = sum(p.numel() for p in teacher.parameters())
    assert f"teacher: {count:,} parameters" in said

    def stop(line):
        if "step 2/3" in line:  # before its snapshot: goes on from step 1
            raise StoppedError

    again = replace(whole, output=str(tmp_path / "again"))
    with pytest.raises(StoppedError):
        pretrain(again, stop)
    pretrain(again, lambda _: None)
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


def test_bf16_is_another_arithmetic_with_float32_weights(large, tmp_path):
    made = []
    for precision in ("fp32", "bf16"):
        one = replace(large, part="teacher", output=str(tmp_path / precision), precision=precision)
        pretrain(one, lambda _: None)
        made.append(weights(one))
    name = "blocks.0.ffn.net.2.weight"
    assert made[1][name].dtype == torch.float32
    assert not torch.equal(made[0][name], made[1][name])
    torch.testing.assert_close(made[0][name], made[1][name], rtol=0, atol=0.05)


def test_the_codec_of_64_pixels_gives_normalised_latents_8_times_smaller(large):
    codec = load_codec(large.codec)
    assert codec.autoencoder.config["encoder_block_out_channels"] == [8] * 4
    latents = codec.encode(to_float(draw_clips(large)))
    assert latents.shape == (5, 4, 16, 8, 8)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4), rtol=0.01, atol=0)


def test_the_judge_of_64_pixels_sees_the_scenes_at_32_and_what_its_codec_makes_of_them(large, tmp_path):
    asked = replace(large, part="judge", output=str(tmp_path))
    pretrain(asked, lambda _: None)
    judge = load_judge(tmp_path / "judge")
    seen = torch.from_numpy(sprites.shrink(draw_clips(large).permute(0, 2, 3, 4, 1).numpy()))
    assert judge(seen.permute(0, 4, 1, 2, 3))["shape"].shape == (5, 3)
    build_tiny_codec(5, width=8).save(tmp_path / "other")
    other = replace(asked, codec=str(tmp_path / "other"), output=str(tmp_path / "through"))
    pretrain(other, lambda _: None)
    unlike = load_judge(tmp_path / "through" / "judge").state_dict()
    assert any(not torch.equal(unlike[name], value) for name, value in judge.state_dict().items())


def test_clips_are_drawn_in_chunks_and_held_once_at_the_size_asked_for(large):
    asked = replace(large, num_clips=70)
    chunks = list(draw_chunks(asked))
    assert [len(chunk) for chunk in chunks] == [64, 6]
    clips = draw_clips(asked)
    assert torch.equal(clips, torch.cat(chunks))
    last = sprites.render(sprites.draw_scene(69), 64)
    assert torch.equal(clips[69].permute(1, 2, 3, 0), torch.from_numpy(last))


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidValue, match="no GPU"):
        pretrain(replace(config, device="cuda"), lambda _: None)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "part=codec", f"output={tmp_path}/here", "device=cuda"])
    with pytest.raises(InvalidValue, match="no GPU"):
        load_job("pretrain").main()
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", 48), ("size", 0), ("num_layers", 0), ("dim_head", 5), ("ffn_dim", 0), ("codec_width", 0)],
)
def test_sizes_that_no_network_or_clip_can_have_are_refused(key, value):
    with pytest.raises(InvalidValue, match=key):
        PretrainConfig(part="teacher", output="x", **{key: value})


def test_poor_clips_have_32_pixels():
    with pytest.raises(InvalidValue, match="severities"):
        PretrainConfig(part="teacher", output="x", size=64, severities=(0.0, 1.0))
