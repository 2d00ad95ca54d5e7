"""Both stages under DeepSpeed in one process: precision, and the device that the networks are on."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from raydistill.config.distill import DistillConfig, EngineConfig, ScaleConfig
from raydistill.config.stages import DetailConfig, OptimizerConfig, SemanticConfig
from raydistill.errors import DistillError
from raydistill.experts.engine import load_deepspeed
from raydistill.experts.loop import distill
from raydistill.experts.parts import Parts
from raydistill.experts.stages import Given, build_stage
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

pytestmark = pytest.mark.distributed

LATENTS, TEXT = (4, 4, 4, 4), (3, 32)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
SIZES = {"global_batch": 4, "micro_batch": 2, "optimizer": OPTIMIZER}
CONFIG = DistillConfig(
    scale=ScaleConfig(num_workers=1), semantic=SemanticConfig(**SIZES), detail=DetailConfig(**SIZES)
)


def _teacher():
    torch.manual_seed(0)
    net = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net


def _batches():
    rng = torch.Generator().manual_seed(1)
    for k in range(100):
        drawn = (torch.randn(2, *shape, generator=rng) for shape in (LATENTS, TEXT))
        yield Batch(torch.arange(2 * k, 2 * k + 2), *drawn)


def _built(name, engine, num_steps=3, semantic=None):
    sizes = {"semantic": SemanticConfig, "detail": DetailConfig}[name](**SIZES, num_steps=num_steps)
    config = replace(CONFIG, engine=engine, **{name: sizes})
    semantic = (semantic or _teacher()) if name == "detail" else None
    empty = torch.zeros(1, *LATENTS), torch.zeros(1, *TEXT)
    return build_stage(config, name, Given(_teacher(), *empty, semantic))


def _trained(name, engine, semantic=None):
    """Moving averages and first figures of a short run."""
    stage, figures = _built(name, engine, semantic=semantic), []
    report = lambda step, values: figures.append(values)  # noqa: E731
    distill(stage, _batches(), report_every=1, save_every=9, report=report, save=lambda step: None)
    copies = {
        kind: {n: w.clone() for n, w in slow.whole(engine)}
        for kind, (engine, slow) in stage.parts()["averages"].copies.items()
    }
    target = {p.dtype for p in stage.target.net.parameters()}
    stage.close()
    return copies, figures[0], target


def _gradient(name, engine, folder):
    """All of the first step's gradient, which AdamW's first moment is a multiple of."""
    stage = _built(name, engine, num_steps=1)
    save = lambda step: stage.engine.save(folder)  # noqa: E731
    distill(stage, _batches(), report_every=1, save_every=1, report=lambda step, values: None, save=save)
    parts = Parts(folder)
    moments = torch.cat([parts.get("exp_avg", n).flatten() for n in stage.engine.trainable_parameters])
    stage.close()
    return moments


@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_in_bf16_every_engine_is_as_near_to_float32(name, tmp_path):
    """ZeRO 3's linear layers round twice, the product and then its sum with the bias: sqrt(2) of once."""
    exact = _gradient(name, EngineConfig(backend="torch"), tmp_path / "exact")
    plain = _gradient(name, EngineConfig(backend="torch", precision="bf16"), tmp_path / "plain")
    rounding = (plain - exact).norm()
    assert rounding < 0.1 * exact.norm()
    for zero_stage in (1, 2, 3):
        engine = EngineConfig(zero_stage=zero_stage, precision="bf16")
        ours = _gradient(name, engine, tmp_path / str(zero_stage))
        assert (ours - exact).norm() < (2**0.5 if zero_stage == 3 else 1.1) * rounding
        assert (ours - plain).norm() < 3**0.5 * rounding  # both errors, with nothing in common


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_a_stage_in_bf16_is_near_plain_torchs(name, zero_stage):
    plain = _trained(name, EngineConfig(backend="torch", precision="bf16"))
    ours = _trained(name, EngineConfig(zero_stage=zero_stage, precision="bf16"))
    assert ours[2] == {torch.bfloat16}
    for key in (k for k in plain[1] if k.startswith("loss/")):
        assert ours[1][key] == pytest.approx(plain[1][key], rel=1e-2), key  # ZeRO 3 adds biases in bfloat16
    for kind, weights in plain[0].items():
        for n, expected in weights.items():
            found = ours[0][kind][n]
            assert found.dtype == torch.float32
            # AdamW takes a full step, here of 1e-3, also along a gradient whose sign is one of rounding.
            assert (found - expected).abs().mean() < 1e-4
            torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_the_detail_expert_leaves_the_semantic_one_bit_for_bit(zero_stage):
    semantic = _teacher()
    before = {n: p.detach().clone() for n, p in semantic.named_parameters()}
    averages, _, _ = _trained("detail", EngineConfig(zero_stage=zero_stage), semantic)
    assert all(torch.equal(p, before[n]) for n, p in semantic.named_parameters())
    copied = [n for n in averages["average"] if n in before]
    assert any(not torch.equal(averages["average"][n], before[n]) for n in copied)


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_activation_checkpointing_changes_no_number(name, zero_stage):
    plain = _trained(name, EngineConfig(zero_stage=zero_stage))
    ours = _trained(name, EngineConfig(zero_stage=zero_stage, activation_checkpointing=True))
    for kind, weights in plain[0].items():
        for n, expected in weights.items():
            torch.testing.assert_close(ours[0][kind][n], expected, msg=f"{kind} {n}")


BESIDE_A_GPU = """
import sys, torch
sys.path[:0] = sys.argv[1:]
torch.cuda.is_available = lambda: True  # the machine has one; this process trains on the CPU
import engine_cases
engine = engine_cases.build(zero_stage=2)
print(engine_cases.train(engine, engine_cases.batches(1, 1)), torch.distributed.get_backend())
"""


def test_a_worker_on_the_cpu_of_a_machine_with_a_gpu_trains_there():
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", BESIDE_A_GPU, *(p for p in sys.path if p)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("gloo\n")


def test_another_device_than_deepspeeds_is_refused():
    load_deepspeed(torch.device("cpu"))
    with pytest.raises(DistillError, match="works on 'cpu' in this process, but the model is on 'cuda'"):
        load_deepspeed(torch.device("cuda"))
