"""What a plan counts without data is what the same step holds and does with data."""

import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pipeline_cases
import pytest
import torch
from diffusers import WanTransformer3DModel
from holding_cases import Real
from job_cases import ROOT, load_job

from raydistill.config.distill import DistillConfig, ScaleConfig, TargetConfig
from raydistill.config.engine import EngineConfig, RoleConfig
from raydistill.config.grid import GridConfig
from raydistill.config.load import run
from raydistill.config.plan import PlanConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, OptimizerConfig, SemanticConfig
from raydistill.errors import DoesNotFit, InvalidValue
from raydistill.experts import planner
from raydistill.experts.advice import changes, plan_lines, require_it_fits
from raydistill.experts.counting import CountedOperations, LiveBytes, memory_efficient_attention
from raydistill.experts.loop import distill
from raydistill.experts.planner import plan_stage
from raydistill.experts.stages import Given, build_stage
from raydistill.models.frame_features import FrameNet
from raydistill.models.teacher import load_schedule, load_teacher

SIZES = {"num_steps": 4, "global_batch": 4, "micro_batch": 2, "optimizer": OptimizerConfig(warmup_steps=0)}
TEXTS = {"wan21": (20, 16), "hunyuan": (21, 16), "cogvideox": (10, 16), "modelscope": (7, 8)}


@pytest.fixture(scope="module", params=TEXTS)
def case(request, tmp_path_factory):
    folder = pipeline_cases.save(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, tuple(pipeline_cases.latents_of(request.param).shape[1:])


def config_of(kind, folder, **more):
    plain = {"adversarial": 0.0, "feature_matching": 0.0}
    judged = ObjectiveConfig(
        **(plain if kind == "modelscope" else {"adversarial": 0.5, "feature_matching": 1.0})
    )
    return DistillConfig(
        **{
            "teacher": str(folder),
            "boundary": 0.5,
            "grid": GridConfig(num_intervals=10),
            "semantic": SemanticConfig(**SIZES),
            "detail": DetailConfig(**SIZES, lora_rank=2, objective=judged),
            "engine": EngineConfig(),
            **more,
        }
    )


@pytest.mark.parametrize("name", ["semantic", "detail"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_operations_are_those_of_a_step_with_data(case, name, checkpointing):
    kind, folder, latents = case
    if kind == "modelscope" and checkpointing:
        pytest.skip("diffusers' UNet3DConditionModel has no checkpointing")
    engine = EngineConfig(activation_checkpointing=checkpointing)
    config = config_of(kind, folder, engine=engine)
    plan = plan_stage(config, name, latents, TEXTS[kind])
    alone = replace(config, engine=replace(engine, backend="torch"), scale=ScaleConfig(num_workers=1))
    semantic = load_teacher(folder).requires_grad_(False) if name == "detail" else None
    x, text = torch.randn(2, *latents), torch.randn(2, *TEXTS[kind])
    given = Given(load_teacher(folder, name), x[:1], text[:1], semantic, load_schedule(folder))
    stage = build_stage(alone, name, given)
    batch = planner.Batch(torch.arange(2), x, text)
    with LiveBytes() as live, CountedOperations() as counted:
        planner._one_micro_batch(stage, batch, partial(planner._leave_out, live), lambda: None)
    assert plan.activations == pytest.approx(live.peak, rel=0.02)
    assert plan.flops == pytest.approx(counted.total / 2, rel=1e-6)
    looks = 2 if name == "detail" and kind != "modelscope" else 0
    assert plan.passes["teacher"] == (1 if kind == "hunyuan" else 2) + looks
    assert plan.passes["student"] == plan.passes["target"] == 1


def test_checkpointing_takes_less_memory_and_more_work(tmp_path):
    """Of the teacher, too, through which the critic's gradients pass."""
    folder = pipeline_cases.save(tmp_path, "wan21")
    pipeline_cases.wan_transformer(layers=6).save_pretrained(folder / "transformer")
    engines = [EngineConfig(activation_checkpointing=on) for on in (False, True)]
    plans = [
        plan_stage(config_of("wan21", folder, engine=engine), "detail", (16, 3, 8, 8), (20, 16))
        for engine in engines
    ]
    assert plans[1].activations < 0.5 * plans[0].activations
    assert 1.05 * plans[0].flops < plans[1].flops < 1.4 * plans[0].flops


def test_a_pass_of_wan_1_3b_is_what_its_layers_and_attention_do():
    """2 operations a weight and token, and 4 n (n + l) d a block for attention; the caption once."""
    with torch.device("meta"):
        net = WanTransformer3DModel(
            num_attention_heads=12, num_layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256
        )
        x, text, t = torch.empty(1, 16, 21, 60, 104), torch.empty(1, 512, 4096), torch.empty(1)
        with torch.no_grad(), memory_efficient_attention(), CountedOperations() as counted:
            net(x, t, text)
    tokens, words, dim = 21 * 30 * 52, 512, 1536
    keys = 2 * 2 * words * dim * dim * 30  # of the caption, in each block
    blocks = 2 * tokens * 30 * (6 * dim * dim + 2 * dim * 8960)
    attention = 4 * tokens * (tokens + words) * dim * 30
    assert counted.total == pytest.approx(blocks + keys + attention, rel=0.005)


def test_roles_share_what_they_share(tmp_path):
    """A LoRA's base is the teacher's; a detail expert's is the semantic's. In float32, one worker."""
    folder = pipeline_cases.save(tmp_path, "wan21")
    net = load_teacher(folder)
    size = 4 * sum(p.numel() for p in net.parameters())
    tables = 2 * sum(x.numel() * x.element_size() for x in net.buffers())
    one = {"scale": ScaleConfig(num_workers=1), "average_decay": 0.0, "target": TargetConfig(kind="online")}
    shape = ((16, 3, 4, 6), (20, 16))

    def weights(name, **more):
        plan = plan_stage(config_of("wan21", folder, **one, **more), name, *shape)
        own = sum(4 * role.trained for role in plan.roles)
        return sum(role.weights for role in plan.roles) - own, own

    frozen, own = weights("semantic")
    assert (frozen, own) == (pytest.approx(size, abs=tables), size)
    frozen, own = weights("semantic", semantic=SemanticConfig(**SIZES, lora_rank=2))
    assert frozen == pytest.approx(size, abs=tables)
    assert own < size
    timed = 4 * sum(p.numel() for name in net.timed for p in getattr(net.network, name).parameters())
    frozen, _ = weights("detail")
    assert frozen == pytest.approx(2 * size - timed, abs=tables)
    frozen, _ = weights("detail", semantic=SemanticConfig(**SIZES, lora_rank=2))
    assert size < frozen < 1.4 * size


def test_zero_divides_and_of_the_averages_the_one_that_is_kept(tmp_path):
    folder = pipeline_cases.save(tmp_path, "wan21")
    net = load_teacher(folder)
    trained = sum(p.numel() for p in net.parameters())
    tables = sum(x.numel() * x.element_size() for x in net.buffers())
    bucket = 4 * -(-trained // 4096) * 4096

    def student(stage, workers, **more):
        how = EngineConfig(zero_stage=stage, **more)
        config = config_of("wan21", folder, engine=how, scale=ScaleConfig(num_workers=workers))
        return plan_stage(config, "semantic", (16, 3, 4, 6), (20, 16)).roles[0]

    for stage, (weights, gradients, optimizer) in {
        0: (4, 4, 8),
        1: (4, 4, 6),
        2: (4, 2, 6),
        3: (2, 2, 6),
    }.items():
        role = student(stage, 2)
        assert role.weights == weights * trained + tables
        assert role.gradients == gradients * trained + (bucket if stage else 0)
        assert role.optimizer == optimizer * trained
        assert role.averages == (4 + (2 if stage == 3 else 4)) * trained  # target and average
    offloaded = student(2, 2, offload_optimizer=True)
    assert offloaded.optimizer == 0
    assert offloaded.host > 10 * trained  # gradients and a temporary beside them
    kept = student(3, 2, offload_optimizer=True)
    assert kept.averages == 6 * trained  # on the device, whatever is not
    assert kept.host == pytest.approx(12 * trained)  # masters, moments, gradients and a temporary
    assert student(2, 2, precision="bf16").weights == 2 * trained + tables


def test_a_sharded_teacher_is_divided_and_the_target_is_not(tmp_path):
    folder = pipeline_cases.save(tmp_path, "wan21")
    net = load_teacher(folder)
    size = 4 * sum(p.numel() for p in net.parameters())
    tables = sum(x.numel() * x.element_size() for x in net.buffers())

    def roles(workers, name="semantic", **more):
        scale = ScaleConfig(num_workers=workers)
        config = config_of("wan21", folder, engine=EngineConfig(**more), scale=scale)
        plan = plan_stage(config, name, (16, 3, 4, 6), (20, 16))
        return {role.name: role for role in plan.roles}

    whole, shared = roles(2), roles(2, shard_teacher=True)
    assert (whole["teacher"].weights, whole["teacher"].gathered) == (size + tables, 0)
    assert shared["teacher"].weights == size // 2 + tables
    layer = 4 * (25 * 16 * 9)  # of the time's projection, the largest here
    assert shared["teacher"].gathered == 2 * layer
    assert {n: r for n, r in shared.items() if n != "teacher"} == {
        n: r for n, r in whole.items() if n != "teacher"
    }
    away = roles(2, shard_teacher=True, offload_teacher=True)["teacher"]
    assert (away.weights, away.host, away.gathered) == (tables, size // 2, 2 * layer)
    own = roles(2, "detail", zero_stage=3, critic=RoleConfig(zero_stage=0))["critic"]
    assert own.gradients == 4 * own.trained  # whole
    through = roles(2, "detail", shard_teacher=True)["teacher"]
    checkpointed = roles(2, "detail", shard_teacher=True, activation_checkpointing=True)["teacher"]
    block = 4 * sum(p.numel() for p in net.network.blocks[0].parameters())
    assert (through.gathered, checkpointed.gathered) == (layer + size, layer + block)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("semantic", EngineConfig(backend="torch", precision="bf16")),
        ("semantic", EngineConfig(zero_stage=2, precision="bf16")),
        ("detail", EngineConfig(zero_stage=2)),
    ],
)
def test_a_plan_is_within_a_tenth_of_a_steps_peak_where_activations_are_few(tmp_path, name, engine):
    """An update is the worst moment then, but for plain torch's. All that the second step holds."""
    folder, shape, text = pipeline_cases.save(tmp_path, "wan21"), (16, 1, 2, 4), (20, 16)
    pipeline_cases.wan_transformer(layers=6).save_pretrained(folder / "transformer")
    sizes = SIZES | {"num_steps": 2, "global_batch": 2, "micro_batch": 1}
    more = {"semantic": SemanticConfig(**sizes), "scale": ScaleConfig(num_workers=1)}
    judged = ObjectiveConfig(adversarial=0.5, feature_matching=1.0)
    more["detail"] = DetailConfig(**sizes, lora_rank=16, objective=judged)
    config = config_of("wan21", folder, engine=engine, **more)
    plan = plan_stage(config, name, shape, text)
    if name == "semantic":
        assert (plan.update[0] > plan.activations) == (engine.backend == "deepspeed")
    with Real() as live:
        semantic = load_teacher(folder).requires_grad_(False) if name == "detail" else None
        given = Given(load_teacher(folder, name), torch.zeros(1, *shape), torch.zeros(1, *text), semantic)
        stage = build_stage(config, name, given)
        del given, semantic
        batches = [planner.Batch(torch.arange(1), torch.randn(1, *shape), torch.randn(1, *text))] * 4
        found = list[int]()
        seen = lambda *_: found.append(live.since())  # noqa: E731
        distill(stage, batches, report_every=1, save_every=9, report=seen, save=lambda _: None)
    for made in stage.engines().values():
        made.close()
    assert found[1] == pytest.approx(plan.device, rel=0.1), plan.roles


SHAPES = {
    "wan21_1_3b/dcm.yaml": ("wan21", (20, 16)),
    "hunyuanvideo/dcm.yaml": ("hunyuan", (21, 16)),
    "cogvideox_2b/dcm.yaml": ("cogvideox", (10, 16)),
    "modelscope/mcm.yaml": ("modelscope", (7, 8)),
    "animatediff/mcm.yaml": ("animatediff", (7, 8)),
}


def asked(tmp_path, config, *more):
    """Command line of a plan of a paper's run, on a small network of the same class."""
    kind, text = SHAPES[config]
    folder = pipeline_cases.save(tmp_path / "model", kind)
    latents = tuple(pipeline_cases.latents_of(kind).shape[1:])
    given = [
        f"plan.latents={list(latents)}",
        f"plan.text={list(text)}",
        f"teacher={folder}",
        f"codec={folder}",
    ]
    if config.endswith("mcm.yaml"):
        FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(tmp_path / "features")
        given.append(f"motion.appearance.features={tmp_path}/features")
    given += [f"output={tmp_path}/run", "semantic.objective.coherence_stride=1"]
    return ["distill.py", "--config", str(ROOT / "jobs" / config), "--plan", *given, *more]


def test_a_student_that_a_target_is_copied_of_is_whole_in_float32_before_it_is_divided(tmp_path):
    """Sixteen workers hold little of it in training, and all of it as they begin; else not even then."""
    with torch.device("meta"):
        net = WanTransformer3DModel(num_layers=2, text_dim=16)
    net.save_config(tmp_path)
    count = sum(p.numel() for p in net.parameters())
    sizes = SIZES | {"global_batch": 16, "micro_batch": 1}
    more = {"semantic": SemanticConfig(**sizes), "detail": DetailConfig(**sizes)}
    more |= {"scale": ScaleConfig(num_workers=16)}
    engine = EngineConfig(zero_stage=3, shard_teacher=True, precision="bf16", activation_checkpointing=True)
    config = config_of("wan21", tmp_path, engine=engine, average_decay=0.5, **more)
    plan = plan_stage(config, "semantic", (16, 1, 2, 2), (3, 16))
    assert plan.loading == 8 * count  # with its target
    assert plan.device >= plan.loading
    online = replace(config, target=TargetConfig(kind="online"))
    apart = plan_stage(online, "semantic", (16, 1, 2, 2), (3, 16))
    assert apart.loading == 0
    assert apart.device < 4 * count
    below = replace(online, engine=replace(engine, zero_stage=2))
    whole = plan_stage(below, "semantic", (16, 1, 2, 2), (3, 16))
    assert whole.loading == 4 * count
    huge = replace(whole, loading=whole.device + 1)
    assert any("whole in float32 on every worker" in line for line in plan_lines(below, huge))


@pytest.mark.parametrize("config", SHAPES)
def test_every_papers_run_is_planned(tmp_path, monkeypatch, capsys, config):
    monkeypatch.setattr(sys, "argv", asked(tmp_path, config))
    load_job("distill").main()
    said = capsys.readouterr().out
    stages = ("motion",) if config.endswith("mcm.yaml") else ("semantic", "detail")
    for name in stages:
        assert f"{name}, each of" in said
    for word in (
        "student",
        "teacher",
        "activations",
        "device-hours",
        *(("codec",) if "motion" in stages else ()),
    ):
        assert said.count(word) >= len(stages), word
    assert not (tmp_path / "run").exists()


def test_a_plan_that_cannot_fit_says_what_to_change(tmp_path, monkeypatch, capsys):
    less = ["plan.memory_gib=0.0002", "engine.activation_checkpointing=false"]
    command = asked(tmp_path, "wan21_1_3b/dcm.yaml", *less)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        run(load_job("distill").main)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "the semantic stage needs" in said.err
    alone = ("activation_checkpointing", "shard_teacher", "offload_optimizer")
    for change in (*alone, "shard_teacher=True engine.offload_teacher"):
        assert change in said.err
    assert not (tmp_path / "run").exists()


def test_what_a_network_cannot_is_not_proposed(tmp_path):
    folder = pipeline_cases.save(tmp_path, "modelscope")
    config = config_of("modelscope", folder, plan=PlanConfig(memory_gib=0.0001))
    shape = ((4, 4, 4, 4), (7, 8))
    with pytest.raises(DoesNotFit) as refused:
        require_it_fits(config, plan_stage(config, "semantic", *shape), *shape)
    assert refused.value.changes
    assert not any("checkpointing" in line for line in refused.value.changes)


def test_what_is_said_to_fit_does(tmp_path):
    folder, shape = pipeline_cases.save(tmp_path, "wan21"), ((16, 3, 8, 8), (20, 16))
    config = config_of("wan21", folder, scale=ScaleConfig(num_workers=2), semantic=SemanticConfig(**SIZES))
    plan = plan_stage(config, "semantic", *shape)
    sizes = dict[str, int]()
    for how, make in changes(config, "semantic"):
        with suppress(InvalidValue):
            sizes[how] = plan_stage(make(), "semantic", *shape).device
    assert len(sizes) == 8  # twice the workers would not divide the batch
    better = [size for size in sizes.values() if size < plan.device]
    # A LoRA of rank 64 is larger than this network, and ZeRO 3 would gather the whole of it ahead.
    assert len(better) == 6
    least = min(better)
    room = PlanConfig(memory_gib=(least + 1) / planner.GIB, reserve=0.0)
    with pytest.raises(DoesNotFit) as refused:
        require_it_fits(replace(config, plan=room), plan, *shape)
    assert "engine.zero_stage=3" in sizes
    assert [" fits" in line for line in refused.value.changes] == [size == least for size in better]
    require_it_fits(replace(config, plan=PlanConfig(memory_gib=1.0)), plan, *shape)
