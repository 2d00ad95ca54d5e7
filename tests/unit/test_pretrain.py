"""Training the small world's own networks: a stop changes nothing, what is done is not done again."""

from dataclasses import replace

import pytest
import torch
from job_cases import load_job
from safetensors.torch import load_file

from raydistill.config.pretrain import PretrainConfig
from raydistill.errors import StaleArtifact
from raydistill.models.codec import build_tiny_codec
from raydistill.models.wan import build_tiny_teacher
from raydistill.world.pretrain import pretrain


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
    assert len(said) == 2 + 3 + 4  # clips, latents and steps 1, 2, 3; then from step 1 on
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
