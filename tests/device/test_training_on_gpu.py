"""Both stages on a GPU, in both engines and precisions, and a CPU run beside it. Each case is a process."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CASE = """
import sys
import tempfile
from dataclasses import replace
from functools import partial
import torch
from raydistill.config.distill import DistillConfig, EngineConfig, ScaleConfig
from raydistill.config.stages import DetailConfig, OptimizerConfig, SemanticConfig
from raydistill.experts.loop import distill
from raydistill.experts.stages import Given, build_stage
from raydistill.models.teacher import load_frozen
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

name, backend, zero_stage, precision, device, *more = sys.argv[1:]
device = torch.device(device)
sizes = {"num_steps": 2, "global_batch": 4, "micro_batch": 2, "optimizer": OptimizerConfig(warmup_steps=1)}
config = DistillConfig(
    scale=ScaleConfig(num_workers=1), semantic=SemanticConfig(**sizes), detail=DetailConfig(**sizes),
    engine=EngineConfig(
        backend=backend, zero_stage=int(zero_stage), precision=precision,
        shard_teacher="sharded" in more, activation_checkpointing="sharded" in more,
        offload_teacher="offloaded" in more, compile_frozen="compiled" in more,
    ),
)
latents, text = torch.zeros(1, 4, 16, 4, 4, device=device), torch.zeros(1, 8, 32, device=device)
teacher = build_tiny_teacher(0).to(device)
semantic = build_tiny_teacher(1).to(device) if name == "detail" else None
given = Given(teacher, latents, text, semantic)
if "sharded" in more:  # read from its folder as it is divided
    with tempfile.TemporaryDirectory() as folder:
        teacher.network.save_pretrained(folder)
        stage = build_stage(config, name, replace(given, load=partial(load_frozen, folder)))
    teacher = stage.shards.module
    place = "cpu" if "offloaded" in more else device.type
    assert all(p.numel() == 0 and p.ds_tensor.device.type == place for p in teacher.parameters())
else:
    stage = build_stage(config, name, given)

def batches():
    for k in range(9):  # indices stay on the CPU, as the worker leaves them
        drawn = (torch.randn(2, *like.shape[1:]).to(device) for like in (latents, text))
        yield Batch(torch.arange(2 * k, 2 * k + 2), *drawn)

seen = []
distill(stage, batches(), report_every=1, save_every=9, report=lambda *a: seen.append(a), save=lambda s: None)
assert [step for step, _ in seen] == [1, 2], seen
low = torch.bfloat16 if precision == "bf16" else torch.float32
nets = [stage.student, teacher, stage.target.net, *(one.engine.module for one in stage.companions.values())]
for net in nets:
    assert {p.device.type for p in net.parameters()} == {device.type}
    assert {p.dtype for p in net.parameters()} == {low}
for _, slow in stage.parts()["averages"].copies.values():
    assert {(w.dtype, w.device.type) for w in slow.weights.values()} == {(torch.float32, device.type)}
stage.close()
print("trained")
"""


def _train(*case):
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", CASE, *map(str, case)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.endswith("trained\n")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("backend", "zero_stage"), [("torch", 2), ("deepspeed", 2), ("deepspeed", 3)])
@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_a_stage_trains_on_the_gpu(name, backend, zero_stage, precision):
    _train(name, backend, zero_stage, precision, "cuda:0")


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_a_divided_teacher_is_read_onto_the_gpu(name, zero_stage):
    _train(name, "deepspeed", zero_stage, "bf16", "cuda:0", "sharded")


@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_a_teacher_in_host_memory_teaches_on_the_gpu(name):
    _train(name, "deepspeed", 2, "bf16", "cuda:0", "sharded", "offloaded")


def test_a_compiled_teacher_teaches_on_the_gpu():
    _train("detail", "deepspeed", 2, "bf16", "cuda:0", "compiled")


def test_a_run_on_the_cpu_of_this_machine_stays_there():
    _train("detail", "deepspeed", 2, "fp32", "cpu")
