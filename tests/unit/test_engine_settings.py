"""Learning-rate curve, DeepSpeed's JSON, parts on disk, and what the schema refuses."""

import json
import pickle
from contextlib import suppress

import pytest
import torch
from torch import nn

from raydistill.config.distill import DistillConfig, GridConfig, ScaleConfig
from raydistill.config.engine import TRAINED_BESIDE, EngineConfig, RoleConfig
from raydistill.config.load import from_command_line
from raydistill.config.stages import (
    CriticConfig,
    DetailConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SemanticConfig,
    StageConfig,
)
from raydistill.errors import IncompatibleCheckpoint, InvalidValue
from raydistill.experts.engine import build_engine
from raydistill.experts.engine_json import deepspeed_config
from raydistill.experts.frozen import frozen_config
from raydistill.experts.parts import Parts
from raydistill.experts.plain_engine import learning_rate_at
from raydistill.models.critic import TokenCritic


def rates(num_steps: int, **optimizer) -> list[float]:
    """The whole curve with peak 1."""
    config = OptimizerConfig(learning_rate=1.0, **optimizer)
    return [learning_rate_at(step, config, num_steps) for step in range(num_steps)]


def test_warm_up_then_constant():
    """The first step already moves; the peak comes with the last step of the warm-up."""
    assert rates(6, warmup_steps=4, decay="constant") == [0.25, 0.5, 0.75, 1, 1, 1]


def test_falls_over_the_last_half():
    """Constant for 5 of 10 steps, then down to 1/5; 0 would come one step after the end."""
    assert rates(10, warmup_steps=0, decay="linear") == pytest.approx([1] * 6 + [0.8, 0.6, 0.4, 0.2])
    assert rates(1, warmup_steps=0, decay="linear") == [1]
    assert rates(3, warmup_steps=3, decay="linear") == pytest.approx([1 / 3, 2 / 3, 0.5])


def test_deepspeed_json():
    """Typed fields first, `extra` merged last, section by section."""
    extra = {
        "zero_optimization": {"overlap_comm": True, "stage3_max_live_parameters": 0},
        "communication_data_type": "fp32",
    }
    config = EngineConfig(zero_stage=3, offload_optimizer=True, precision="bf16", extra=extra)
    optimizer, device = OptimizerConfig(gradient_clipping=0.5), torch.device("cpu")
    made = deepspeed_config(config, optimizer, accumulation=4, num_weights=5000, device=device)
    assert made["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 8192,
        "allgather_bucket_size": 8192,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 200_000_000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
    assert made["communication_data_type"] == "fp32"
    json.dumps(made)


def test_a_frozen_networks_shards_go_to_host_memory():
    """Pinned beside a GPU, from where layers come one after the other."""
    for name, pinned in (("cpu", False), ("cuda", True)):
        made = frozen_config(torch.bfloat16, torch.device(name), True)["zero_optimization"]
        assert made["offload_param"] == {"device": "cpu", "pin_memory": pinned}
        assert (
            "offload_param"
            not in frozen_config(torch.bfloat16, torch.device(name), False)["zero_optimization"]
        )


def test_each_trained_network_may_have_its_own():
    own = {"critic": RoleConfig(zero_stage=1), "image_critic": RoleConfig(offload_optimizer=False)}
    config = EngineConfig(zero_stage=3, offload_optimizer=True, precision="bf16", shard_teacher=True, **own)
    found = {role: config.of(role) for role in TRAINED_BESIDE}
    assert {role: one.zero_stage for role, one in found.items()} == {
        "critic": 1,
        "image_critic": 3,
        "motion_head": 3,
    }
    assert [found[role].offload_optimizer for role in TRAINED_BESIDE] == [True, False, True]
    assert [found[role].precision for role in TRAINED_BESIDE] == ["bf16", "fp32", "fp32"]
    assert not any(one.shard_teacher for one in found.values())
    whole = EngineConfig(zero_stage=3, offload_optimizer=True, critic=RoleConfig(zero_stage=0))
    assert not whole.of("critic").offload_optimizer


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["engine.critic.zero_stage=4"], "engine.critic.zero_stage"),
        (["engine.critic.offload_optimizer=true", "engine.critic.zero_stage=0"],
         "engine.critic.offload_optimizer"),
        (["engine.precision=bf16", "engine.critic.zero_stage=0"], "engine.precision"),
        (["engine.motion_head.offload_optimizer=true", "engine.backend=torch"],
         "engine.motion_head.offload_optimizer"),
        (["engine.offload_teacher=true"], "engine.offload_teacher"),
    ],
)  # fmt: skip
def test_a_roles_own_settings_are_checked_by_their_names(given, key):
    with pytest.raises(InvalidValue) as refused:
        from_command_line(DistillConfig, given)
    assert refused.value.key == key


@pytest.fixture
def engine():
    """One step of plain torch on a small network."""
    torch.manual_seed(0)
    made = build_engine(nn.Linear(3, 2), EngineConfig(backend="torch"), OptimizerConfig(), num_steps=10)
    made.backward(made.module(torch.ones(4, 3)).square().mean())
    assert made.step()
    return made


def test_parts_refuse_other_weights(engine, tmp_path):
    """Names and shapes are compared before anything is read."""
    engine.save(tmp_path)
    for module in (nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.Sequential(nn.Linear(3, 2))):
        other = build_engine(module, EngineConfig(backend="torch"), OptimizerConfig(), num_steps=10)
        with pytest.raises(IncompatibleCheckpoint, match="differ, first"):
            other.load(tmp_path)


def test_parts_must_be_whole(engine, tmp_path):
    """A missing rank's part, parts of two steps, or no safetensors file at all."""
    engine.save(tmp_path)
    part = tmp_path / "part-00000-of-00001.safetensors"
    part.rename(tmp_path / "part-00000-of-00002.safetensors")
    with pytest.raises(IncompatibleCheckpoint, match="1 parts"):
        Parts(tmp_path)
    (tmp_path / "part-00001-of-00002.safetensors").write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(IncompatibleCheckpoint, match="not a part"):
        Parts(tmp_path)
    with pytest.raises(IncompatibleCheckpoint, match="0 parts"):
        Parts(tmp_path / "nothing")


def test_before_the_first_step(tmp_path):
    """Step 0 has weights and no moments."""
    torch.manual_seed(0)
    settings = (EngineConfig(backend="torch"), OptimizerConfig())
    fresh = build_engine(nn.Linear(3, 2), *settings, num_steps=10)
    fresh.save(tmp_path)
    other = build_engine(nn.Linear(3, 2), *settings, num_steps=10)
    other.load(tmp_path)
    assert other.steps == 0
    assert all(torch.equal(other.weights()[n], w) for n, w in fresh.weights().items())


def test_defaults_are_a_run_on_two_cores():
    """They pass their own checks, survive pickling, and accumulate nothing."""
    config = DistillConfig()
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.semantic.accumulation(config.scale.num_workers) == 1
    assert StageConfig(global_batch=96, micro_batch=8).accumulation(4) == 3


REFUSED = {
    "boundary": lambda: DistillConfig(boundary=1.0),
    "grid.last": lambda: DistillConfig(boundary=0.01, grid=GridConfig(last=0.02)),
    "grid.num_intervals": lambda: GridConfig(num_intervals=1),
    "grid.shift": lambda: GridConfig(shift=0.0),
    "semantic.objective.adversarial": lambda: DistillConfig(
        semantic=SemanticConfig(objective=ObjectiveConfig(adversarial=0.1))
    ),
    "semantic.global_batch": lambda: DistillConfig(semantic=SemanticConfig(global_batch=33)),
    "detail.global_batch": lambda: DistillConfig(detail=DetailConfig(global_batch=24, micro_batch=16)),
    "semantic.optimizer.warmup_steps": lambda: DistillConfig(semantic=SemanticConfig(num_steps=5)),
    "objective.coherence_stride": lambda: ObjectiveConfig(coherence_stride=0),
    "optimizer.learning_rate": lambda: OptimizerConfig(learning_rate=float("nan")),
    "optimizer.betas": lambda: OptimizerConfig(betas=(0.9, 1.0)),
    "engine.zero_stage": lambda: EngineConfig(zero_stage=4),
    "engine.offload_optimizer": lambda: EngineConfig(zero_stage=0, offload_optimizer=True),
    "engine.shard_teacher": lambda: EngineConfig(backend="torch", shard_teacher=True),
    "engine.shard_teacher ": lambda: EngineConfig(compile_frozen=True, shard_teacher=True),
    "engine.precision": lambda: EngineConfig(zero_stage=0, precision="bf16"),
    "scale.num_workers": lambda: ScaleConfig(num_workers=0),
    "average_decay": lambda: DistillConfig(average_decay=1.0),
    "save_every": lambda: DistillConfig(save_every=0),
    "critic.stride": lambda: CriticConfig(stride=0),
    "critic.channels": lambda: CriticConfig(channels=96 + 2),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_settings(key):
    """Before anything runs, with the key as it is written in the job file."""
    with pytest.raises(InvalidValue) as caught:
        REFUSED[key]()
    assert caught.value.key == key.strip()


def test_every_width_that_the_settings_allow_makes_a_critic():
    allowed = []
    for channels in range(1, 300):
        with suppress(InvalidValue):
            allowed.append(CriticConfig(channels=channels).channels)
    assert allowed == [*range(2, 65, 2), *range(96, 300, 32)]
    assert all(TokenCritic(1, 2, channels) for channels in allowed)


def test_single_has_no_detail_stage():
    """Its batch is not looked at, nor where the grid ends."""
    DistillConfig(experts="single", detail=DetailConfig(global_batch=7), grid=GridConfig(last=0.9))


def test_a_lora_below_zero_3_has_its_teachers_own_weights():
    """They are held once; taken apart under the student they would be of no use to it."""
    sharded = {"engine": EngineConfig(shard_teacher=True)}
    lora = {"semantic": SemanticConfig(lora_rank=4)}
    for more in (lora, {"experts": "motion"}, {"experts": "single"} | lora):
        with pytest.raises(InvalidValue, match=r"hold their weights once; or engine.zero_stage = 3"):
            DistillConfig(**sharded, **more)
        DistillConfig(engine=EngineConfig(shard_teacher=True, zero_stage=3), **more)
    DistillConfig(**sharded)
