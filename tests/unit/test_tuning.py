"""Kernels of attention by role and compiled blocks change how networks compute, and no number."""

from dataclasses import replace

import pipeline_cases
import pytest
import torch
import unet_cases
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._dynamo.testing import CompileCounterWithBackend

from raydistill.config.distill import DistillConfig, ScaleConfig, TargetConfig
from raydistill.config.engine import AttentionConfig, EngineConfig
from raydistill.config.grid import GridConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, OptimizerConfig, SemanticConfig
from raydistill.errors import InvalidValue
from raydistill.experts import stages
from raydistill.experts.loop import draw
from raydistill.experts.planner import plan_stage
from raydistill.experts.stages import Given, build_stage, require_own_networks
from raydistill.models import tuning
from raydistill.models.cogvideox import CogVideoXField
from raydistill.models.hunyuan import HunyuanField
from raydistill.models.unet import UNetField
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

SIZES = {"num_steps": 4, "global_batch": 4, "micro_batch": 2, "optimizer": OptimizerConfig(warmup_steps=0)}
CONFIG = DistillConfig(
    boundary=0.5,
    grid=GridConfig(num_intervals=10),
    scale=ScaleConfig(num_workers=1),
    semantic=SemanticConfig(**SIZES),
    detail=DetailConfig(
        **SIZES, lora_rank=2, objective=ObjectiveConfig(adversarial=0.5, feature_matching=1.0)
    ),
    engine=EngineConfig(backend="torch"),
)
MATH, FLASH = "_native_math", "_native_flash"


def teacher():
    return pipeline_cases.stirred(build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=3))


def stage_of(name="detail", **engine):
    config = replace(CONFIG, engine=replace(CONFIG.engine, **engine))
    shapes = torch.zeros(1, 4, 4, 4, 4), torch.zeros(1, 3, 32)
    return build_stage(config, name, Given(teacher(), *shapes, teacher() if name == "detail" else None))


def batch_of(size, start=0):
    rng = torch.Generator().manual_seed(start)
    sizes = (size, 4, 4, 4, 4), (size, 3, 32)
    return Batch(torch.arange(start, start + size), *(torch.randn(one, generator=rng) for one in sizes))


def drawn(stage, batch):
    """Loss, critic's loss, and all gradients of one micro-batch."""
    losses, kept = draw(stage, batch)
    stage.engine.backward(losses.total)
    values = [losses.total.detach()]
    for name, companion in stage.companions.items():
        turn = companion.turn(kept[name])
        turn.total.backward()
        values.append(turn.total.detach())
    found = [p.grad for engine in stage.engines().values() for p in engine.trainable_parameters.values()]
    return [*values, *(g for g in found if g is not None)]


@pytest.fixture
def used(monkeypatch):
    """(role, backend) of every call of attention; roles are named by pre-hooks of the tests."""
    seen, role = set(), ["nobody"]

    def spied(name, kernel):
        def call(*args, **kwargs):
            seen.add((role[-1], name.value))
            return kernel(*args, **kwargs)

        return call

    backends = {name: spied(name, kernel) for name, kernel in _AttentionBackendRegistry._backends.items()}
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", backends)

    def watch(title, net):
        net.register_forward_pre_hook(lambda *_: role.append(title))
        net.register_forward_hook(lambda *_: (role.pop(), None)[1])  # what a hook gives replaces the output

    return seen, watch


@pytest.mark.parametrize("kind", ["ema", "online"])
def test_every_role_uses_its_own_kernel_and_others_keep_theirs(used, kind):
    """diffusers' own call would make the last kernel that of every network without a choice."""
    seen, watch = used
    before = _AttentionBackendRegistry.get_active_backend()[0]
    given = teacher()
    config = replace(CONFIG, target=TargetConfig(kind=kind))
    config = replace(
        config, engine=replace(config.engine, attention=AttentionConfig(student=MATH, frozen=FLASH))
    )
    stage = build_stage(config, "semantic", Given(given, torch.zeros(1, 4, 4, 4, 4), torch.zeros(1, 3, 32)))
    watch("teacher", given)
    watch("student", stage.student)
    if kind == "ema":
        watch("target", stage.target.net)
    drawn(stage, batch_of(2))
    expected = {("teacher", FLASH), ("student", MATH)} | ({("target", FLASH)} if kind == "ema" else set())
    assert seen == expected
    seen.clear()
    teacher()(*(torch.zeros(1, 4, 4, 4, 4), torch.ones(1), torch.zeros(1, 3, 32)))
    assert seen == {("nobody", before.value)}


@pytest.mark.parametrize("chosen", [{"frozen": MATH}, {"student": MATH}, {"student": FLASH, "frozen": MATH}])
def test_one_role_alone_may_choose_and_no_number_changes(used, chosen):
    seen, watch = used
    stage = stage_of(attention=AttentionConfig(**chosen))
    watch("student", stage.student)
    ours = drawn(stage, batch_of(2))
    assert {name for role, name in seen if role == "student"} == {chosen.get("student", "native")}
    assert {name for role, name in seen if role != "student"} == {chosen.get("frozen", "native")}
    for one, other in zip(ours, drawn(stage_of(), batch_of(2)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def refused(kind, tmp_path, config=CONFIG, **attention):
    folder = pipeline_cases.save(tmp_path, kind)
    engine = replace(config.engine, attention=AttentionConfig(**attention))
    plain = replace(config.detail, objective=ObjectiveConfig())
    config = replace(config, detail=plain) if kind == "modelscope" else config
    require_own_networks(replace(config, teacher=str(folder), engine=engine))


def test_names_and_networks_are_checked_before_any_work(tmp_path):
    with pytest.raises(InvalidValue, match=r"engine\.attention\.student = 'falsh': one of .*_native_math"):
        refused("wan21", tmp_path / "a", student="falsh")
    with pytest.raises(InvalidValue, match=r"engine\.attention\.frozen.*UNet3DConditionModel"):
        refused("modelscope", tmp_path / "b", frozen=MATH)
    with pytest.raises(InvalidValue, match=r"engine\.attention\.student.*CogVideoXTransformer3DModel"):
        refused("cogvideox", tmp_path / "c", student=MATH)
    refused("hunyuan", tmp_path / "d", student=MATH, frozen=FLASH)
    assert not list(tuning.attention_layers(CogVideoXField(pipeline_cases.cogvideox_transformer())))
    assert list(tuning.attention_layers(HunyuanField(pipeline_cases.hunyuan_transformer())))


def test_kernels_without_a_backward_pass_are_refused_where_a_gradient_passes(tmp_path):
    for i, name in enumerate(("sage", "_sage_qk_int8_pv_fp8_cuda", "_flash_3", "_native_npu")):
        with pytest.raises(InvalidValue, match=r"engine\.attention\.student.*backward"):
            refused("wan21", tmp_path / f"a{i}", student=name)
    with pytest.raises(InvalidValue, match=r"engine\.attention\.frozen.*backward"):
        refused("wan21", tmp_path / "b", frozen="sage")
    refused("wan21", tmp_path / "c", config=replace(CONFIG, experts="single"), frozen="sage")
    refused("wan21", tmp_path / "d", student="_flash_3_hub", frozen="flash")
    names = {one.value for one in AttentionBackendName}
    assert all(any(n.startswith(start) for n in names) for start in tuning.FORWARD_ONLY)


def test_a_kernel_whose_package_is_missing_is_said_by_its_setting():
    with pytest.raises(InvalidValue, match=r"engine\.attention\.frozen = 'flash'.*flash-attn"):
        stage_of(attention=AttentionConfig(frozen="flash"))


@pytest.fixture
def counted(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(tuning, "COMPILER", counter)
    yield counter
    torch._dynamo.reset()


# Dynamo itself looks at `.grad` of what no leaf is.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("checkpointing", "sizes"), [(False, (2, 3)), (True, (2,))])
def test_compiled_blocks_change_no_number_of_a_step_with_a_critic(counted, checkpointing, sizes):
    """Guided pairs, the critic's looks with and without gradient, and batches of several sizes."""
    how = {"activation_checkpointing": checkpointing}
    plain, compiled = stage_of(**how), stage_of(**how, compile_frozen=True)
    for step, size in enumerate(sizes):
        batch = batch_of(size, 10 * step)
        for one, other in zip(drawn(plain, batch), drawn(compiled, batch), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert 3 <= counted.frame_count <= 8  # two networks of three blocks: blocks that are alike share one


def test_compiling_changes_no_name_and_no_weight(counted):
    plain, compiled = stage_of("semantic"), stage_of("semantic", compile_frozen=True)
    drawn(compiled, batch_of(2))
    assert counted.frame_count
    for one, other in ((plain.target.net, compiled.target.net), (plain.student, compiled.student)):
        assert list(one.state_dict()) == list(other.state_dict())
    stage = compiled
    before = stage.target.net(*(torch.ones(1, 4, 4, 4, 4), torch.ones(1), torch.ones(1, 3, 32)))
    with torch.no_grad():
        for weight in stage.target.weights.values():
            weight.mul_(0.5)
    stage.target.publish()
    after = stage.target.net(*(torch.ones(1, 4, 4, 4, 4), torch.ones(1), torch.ones(1, 3, 32)))
    assert not torch.allclose(before, after)  # what is averaged is what is computed with


@pytest.mark.parametrize("kind", ["unet3d", "unet_motion"])
def test_blocks_of_a_unet_are_compiled_too(counted, kind):
    plain, compiled = (UNetField(getattr(unet_cases, kind)()).eval() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    assert tuning.compile_blocks(compiled.network) >= 2
    x, text = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 7, 8)
    with torch.no_grad():
        ours, theirs = (net(x, torch.tensor([0.3, 0.9]), text) for net in (compiled, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert counted.frame_count >= 2


@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_a_plan_is_the_same_with_these_settings(tmp_path, monkeypatch, name):
    """It compiles nothing, and needs no package of a kernel."""
    folder = pipeline_cases.save(tmp_path, "wan21")
    config = replace(CONFIG, teacher=str(folder))
    kernels = AttentionConfig(student="flash", frozen=MATH)
    tuned = replace(config, engine=replace(config.engine, compile_frozen=True, attention=kernels))
    monkeypatch.setattr(stages, "compile_blocks", lambda _: pytest.fail("compiled"))
    plans = [plan_stage(one, name, (16, 3, 4, 6), (20, 16)) for one in (config, tuned)]
    assert plans[0] == plans[1]
