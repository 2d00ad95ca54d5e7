"""The cast of a stage, its averages, and a run taken up where it stopped, with the engine in plain torch."""

from dataclasses import replace

import pytest
import torch

from raydistill.config.distill import (
    DetailConfig,
    DistillConfig,
    EngineConfig,
    OptimizerConfig,
    ScaleConfig,
    StageConfig,
    TargetConfig,
)
from raydistill.consistency.schedule import TimeGrid
from raydistill.experts.analyse import analyse, propose_boundary
from raydistill.experts.loop import distill
from raydistill.experts.stages import build_segment, build_stage
from raydistill.models.expert import own_state
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
CONFIG = DistillConfig(
    engine=EngineConfig(backend="torch"),
    scale=ScaleConfig(num_workers=1),
    semantic=StageConfig(num_steps=4, global_batch=4, micro_batch=2, optimizer=OPTIMIZER),
    detail=DetailConfig(num_steps=4, global_batch=4, micro_batch=2, optimizer=OPTIMIZER, lora_rank=2),
)
SHAPE, TEXT = (4, 4, 4, 4), (3, 32)


def _teacher():
    net = build_tiny_teacher(0, dim_head=12, num_heads=2, num_layers=2)
    rng = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return net


def _row(i):
    rng = torch.Generator().manual_seed(i)
    return torch.randn(SHAPE, generator=rng), torch.randn(TEXT, generator=rng)


def _batches(step=0):
    while True:
        rows = [_row(2 * step), _row(2 * step + 1)]
        index = torch.arange(2 * step, 2 * step + 2)
        yield Batch(index, torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))
        step += 1


def _stage(config=CONFIG, name="semantic", semantic=None):
    return build_stage(config, name, _teacher(), semantic, torch.zeros(1, *SHAPE), torch.zeros(1, *TEXT))


def _run(stage, start=0, save_every=100, save=lambda step: None):
    seen = []
    distill(
        stage, _batches(2 * start), report_every=1, save_every=save_every,
        report=lambda step, figures: seen.append((step, figures)), save=save,
    )  # fmt: skip
    return seen


def test_averages_follow_their_closed_form():
    stage = _stage(replace(CONFIG, target=TargetConfig(decay=0.5), average_decay=0.9))
    history = [{n: p.detach().clone() for n, p in stage.student.named_parameters()}]
    step = stage.engine.step

    def step_and_remember():
        done = step()
        if done:
            history.append({n: p.detach().clone() for n, p in stage.student.named_parameters()})
        return done

    stage.engine.step = step_and_remember
    _run(stage)
    assert len(history) == 5
    for slow, decay in ((stage.target, 0.5), (stage.average, 0.9)):
        expected = dict(history[0])
        for count, weights in enumerate(history[1:], 1):
            mu = min(decay, (1 + count) / (10 + count))
            expected = {n: mu * w + (1 - mu) * weights[n] for n, w in expected.items()}
        for name, p in slow.named_parameters():
            torch.testing.assert_close(p.data, expected[name])
            assert not torch.equal(p.data, history[-1][name])


def test_an_online_target_is_the_student_itself():
    stage = _stage(replace(CONFIG, target=TargetConfig(kind="online"), average_decay=0.0))
    assert stage.nets.target is stage.student
    assert stage.result is stage.student
    assert stage.nets.teacher is not stage.student


def test_a_target_is_neither_teacher_nor_student():
    stage = _stage()
    assert stage.nets.target is stage.target
    assert stage.target is not stage.student
    teacher = {n: p.clone() for n, p in _teacher().named_parameters()}
    _run(stage)
    assert any(not torch.equal(p, teacher[n]) for n, p in stage.target.named_parameters())


def test_a_saved_stage_goes_on_bit_for_bit(tmp_path):
    semantic = _stage().result
    unbroken = _stage(name="detail", semantic=semantic)
    _run(unbroken)

    def save(stage):
        for role, engine in stage.engines().items():
            engine.save(tmp_path / role)
        stage.save_averages(tmp_path / "averages.safetensors")

    first = _stage(name="detail", semantic=semantic)

    def save_and_die(step):
        save(first)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        _run(first, save_every=2, save=save_and_die)
    second = _stage(name="detail", semantic=semantic)
    for role, engine in second.engines().items():
        engine.load(tmp_path / role)
    second.load_averages(tmp_path / "averages.safetensors")
    assert second.engine.steps == 2
    _run(second, start=2)
    for ours, theirs in ((second.student, unbroken.student), (second.average, unbroken.average)):
        assert all(torch.equal(v, own_state(theirs)[n]) for n, v in own_state(ours).items())
    pairs = zip(second.judges.critic.parameters(), unbroken.judges.critic.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_stages_own_their_side_of_the_boundary():
    semantic, detail = build_segment(CONFIG, "semantic"), build_segment(CONFIG, "detail")
    assert (semantic.upper, semantic.lower) == (1.0, CONFIG.boundary)
    assert (detail.upper, detail.lower) == (CONFIG.boundary, 0.0)
    assert semantic.seed != detail.seed
    single = build_segment(replace(CONFIG, experts="single"), "semantic")
    assert (single.upper, single.lower) == (1.0, 0.0)


def test_two_full_experts_share_nothing():
    first = _stage().result
    stage = _stage(replace(CONFIG, experts="dual_full"), "detail", first)
    assert all(p.requires_grad for p in stage.student.parameters())
    assert not {id(p) for p in stage.student.parameters()} & {id(p) for p in first.parameters()}


def test_activation_checkpointing_changes_no_number():
    plain, recomputed = (
        _stage(),
        _stage(replace(CONFIG, engine=EngineConfig(backend="torch", activation_checkpointing=True))),
    )
    _run(plain), _run(recomputed)
    assert recomputed.student.transformer.is_gradient_checkpointing
    for a, b in zip(plain.student.parameters(), recomputed.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_every_figure_of_a_report_is_there():
    figures = dict(_run(_stage(name="detail", semantic=_stage().result)))[4]
    assert {
        "loss/consistency",
        "loss/adversarial",
        "loss/feature_matching",
        "loss/critic",
        "grad_norm",
    } <= figures.keys()


def test_the_proposed_boundary_is_where_the_change_of_x0_drops():
    grid = TimeGrid(20)
    times = grid.times.tolist()[1:-1]
    assert propose_boundary(grid, times, [1.0 if t > 0.7 else 0.1 for t in times]) == pytest.approx(0.7)


def test_the_analysis_watches_every_probed_time(tmp_path):
    _teacher().transformer.save_pretrained(tmp_path)
    result = analyse(replace(CONFIG, teacher=str(tmp_path)), _row, 8, report=lambda line: None)
    assert len(result["loss"]) == len(result["steps"]) == len(result["gradient"])
    assert all(len(row) == len(result["times"]) for row in result["loss"])
    assert len(result["change"]) == len(result["change_times"]) == CONFIG.grid.num_intervals - 1
    assert 0 < result["boundary"] < 1
