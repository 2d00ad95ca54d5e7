"""Pretraining on a GPU: the losses of a CPU run, and a stop changes nothing."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from raydistill.config.pretrain import PretrainConfig
from raydistill.world.pretrain import pretrain

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PARTS = {
    "codec": "codec/diffusion_pytorch_model.safetensors",
    "judge": "judge/judge.safetensors",
    "teacher": "teacher/diffusion_pytorch_model.safetensors",
}


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Small networks for 64 pixels, with a codec made on the CPU."""
    folder = str(tmp_path_factory.mktemp("pretrain"))
    sizes = {"num_layers": 2, "num_heads": 2, "dim_head": 12, "ffn_dim": 40, "codec_width": 8, "size": 64}
    made = PretrainConfig(
        part="codec", output=folder, num_steps=3, batch=4, num_clips=8, save_every=1, **sizes
    )
    pretrain(made, lambda _: None)
    return replace(made, codec=f"{folder}/codec")


def weights(config, part):
    return load_file(f"{config.output}/{PARTS[part]}")


def losses(config):
    said = []
    pretrain(config, said.append)
    return [float(line.split(" loss ")[1].split()[0]) for line in said if " loss " in line]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("precision", "near"), [("fp32", 0.01), ("bf16", 0.05)])
def test_losses_are_those_of_the_cpu(config, tmp_path, part, precision, near):
    one = replace(config, part=part)
    cpu = losses(replace(one, output=str(tmp_path / "cpu")))
    gpu = losses(replace(one, output=str(tmp_path / "gpu"), device="cuda", precision=precision))
    assert gpu == pytest.approx(cpu, rel=near)


def test_a_run_on_a_gpu_that_was_stopped_goes_on(config, tmp_path):
    whole = replace(config, part="teacher", output=str(tmp_path / "whole"), device="cuda", precision="bf16")
    pretrain(whole, lambda _: None)

    def stop(line):
        if "step 2/3" in line:  # before its snapshot: goes on from step 1
            raise StoppedError

    again = replace(whole, output=str(tmp_path / "again"))
    with pytest.raises(StoppedError):
        pretrain(again, stop)
    pretrain(again, lambda _: None)
    torch.testing.assert_close(weights(again, "teacher"), weights(whole, "teacher"), rtol=0, atol=1e-4)
