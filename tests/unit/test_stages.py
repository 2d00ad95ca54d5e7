"""The cast of a stage, its averages, and a run taken up where it stopped, with the engine in plain torch."""

import copy
from dataclasses import replace

import pytest
import torch

from raydistill.config.distill import DistillConfig, EngineConfig, ScaleConfig, TargetConfig
from raydistill.config.stages import DetailConfig, OptimizerConfig, SemanticConfig
from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import InvalidValue
from raydistill.experts import stages
from raydistill.experts.analyse import analyse, propose_boundary
from raydistill.experts.loop import distill, draw
from raydistill.experts.stages import Given, build_segment, build_stage
from raydistill.experts.worker import load_result
from raydistill.models.expert import own_state
from raydistill.models.wan import WanField, build_tiny_teacher
from raydistill.types import Batch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
CONFIG = DistillConfig(
    engine=EngineConfig(backend="torch"),
    scale=ScaleConfig(num_workers=1),
    semantic=SemanticConfig(num_steps=4, global_batch=4, micro_batch=2, optimizer=OPTIMIZER),
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


def _stage(config=CONFIG, name="semantic", semantic=None, teacher=None):
    shapes = torch.zeros(1, *SHAPE), torch.zeros(1, *TEXT)
    return build_stage(config, name, Given(teacher or _teacher(), *shapes, semantic))


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
        expected = _averaged(history, decay)
        assert slow.weights.keys() == expected.keys()
        for name, weight in slow.weights.items():
            torch.testing.assert_close(weight, expected[name])
            assert not torch.equal(weight, history[-1][name])
    for name, p in stage.target.net.named_parameters():
        assert torch.equal(p.data, stage.target.weights[name])


def _averaged(history, decay):
    """The moving average of successive weights, as its definition says."""
    expected = dict(history[0])
    for count, weights in enumerate(history[1:], 1):
        mu = min(decay, (1 + count) / (10 + count))
        expected = {n: mu * w + (1 - mu) * weights[n] for n, w in expected.items()}
    return expected


def test_an_online_target_is_the_student_itself():
    stage = _stage(replace(CONFIG, target=TargetConfig(kind="online"), average_decay=0.0))
    assert stage.nets.target is stage.student
    assert not stage.parts()["averages"].copies
    assert stage.nets.teacher is not stage.student


def test_a_target_is_neither_teacher_nor_student():
    stage = _stage()
    assert stage.nets.target is stage.target.net
    assert stage.target.net is not stage.student
    teacher = {n: p.clone() for n, p in _teacher().named_parameters()}
    _run(stage)
    assert any(not torch.equal(p, teacher[n]) for n, p in stage.target.net.named_parameters())


def test_a_saved_stage_goes_on_bit_for_bit(tmp_path):
    semantic = _stage().student
    unbroken = _stage(name="detail", semantic=semantic)
    _run(unbroken)

    def save(stage):
        for name, part in stage.parts().items():
            part.save(tmp_path / name)

    first = _stage(name="detail", semantic=semantic)

    def save_and_die(step):
        save(first)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        _run(first, save_every=2, save=save_and_die)
    second = _stage(name="detail", semantic=semantic)
    for name, part in second.parts().items():
        part.load(tmp_path / name)
    assert second.engine.steps == 2
    _run(second, start=2)
    theirs = own_state(unbroken.student)
    assert all(torch.equal(v, theirs[n]) for n, v in own_state(second.student).items())
    for name, (_, slow) in second.parts()["averages"].copies.items():
        theirs = unbroken.parts()["averages"].copies[name][1].weights
        assert all(torch.equal(w, theirs[n]) for n, w in slow.weights.items())
    pairs = zip(*(one.engines()["critic"].module.parameters() for one in (second, unbroken)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_nothing_of_a_step_stays_behind_on_the_host(name):
    # `meta` stands for an accelerator: it refuses to meet tensors of the CPU. Indices alone stay there.
    teacher = _teacher().to("meta")
    semantic = _stage().student.to("meta") if name == "detail" else None
    empty = torch.zeros(1, *SHAPE, device="meta"), torch.zeros(1, *TEXT, device="meta")
    stage = build_stage(CONFIG, name, Given(teacher, *empty, semantic))
    batch = next(_batches())
    losses, seen = draw(stage, Batch(batch.index, batch.latents.to("meta"), batch.text.to("meta")))
    stage.engine.backward(losses.total)
    assert all(p.grad.is_meta for p in stage.engine.trainable_parameters.values() if p.grad is not None)
    if name == "detail":
        critic = stage.companions["critic"]
        assert all(p.is_meta for p in critic.engine.module.parameters())
        critic.engine.backward(critic.turn(seen["critic"]).total)


BF16 = replace(CONFIG, engine=EngineConfig(backend="torch", precision="bf16"))


@pytest.mark.parametrize("target", ["ema", "online"])
@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_in_bf16_every_network_computes_in_bf16_near_float32(name, target):
    config = replace(BF16, target=TargetConfig(kind=target))
    teacher, semantic = _teacher(), (_stage().student if name == "detail" else None)
    high = _stage(replace(CONFIG, target=config.target), name, copy.deepcopy(semantic))
    low = _stage(config, name, semantic, teacher)
    for net in (
        teacher,
        low.student,
        low.nets.target,
        *(one.engine.module for one in low.companions.values()),
    ):
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in net.buffers()} <= {torch.float32, torch.float64}
    ours, theirs = dict(_run(low)), dict(_run(high))
    for key in (k for k in theirs[1] if k.startswith("loss/")):
        assert ours[1][key] == pytest.approx(theirs[1][key], rel=0.05), key
    assert ours.keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["semantic", "detail"])
def test_in_bf16_averages_and_the_result_are_float32(name, tmp_path):
    # Each step is far below bfloat16's spacing: an average kept in it would stand still.
    config = replace(BF16, average_decay=0.9, target=TargetConfig(decay=0.9))
    stage = _stage(config, name, _stage().student if name == "detail" else None)
    history = [{n: w.clone() for n, w in stage.average.weights.items()}]
    update = stage.update_averages

    def remember_and_update():
        history.append(stage.engine.weights())
        update()

    stage.update_averages = remember_and_update
    _run(stage)
    expected = _averaged(history, 0.9)
    for slow in (stage.target, stage.average):
        for n, weight in slow.weights.items():
            assert weight.dtype == torch.float32
            torch.testing.assert_close(weight, expected[n])
    own = dict(stage.target.net.named_parameters())
    assert all(torch.equal(own[n], w.bfloat16()) for n, w in stage.target.weights.items())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in stage.average.weights.values())
    stage.parts()["averages"].save(tmp_path / "averages")
    kept = load_result(config, tmp_path, _teacher(), _stage().student if name == "detail" else None)
    assert {p.dtype for p in kept.parameters()} == {torch.float32}
    assert all(torch.equal(dict(kept.named_parameters())[n], w) for n, w in stage.average.weights.items())


def test_stages_own_their_side_of_the_boundary():
    semantic, detail = build_segment(CONFIG, "semantic"), build_segment(CONFIG, "detail")
    assert (semantic.upper, semantic.lower) == (1.0, CONFIG.boundary)
    assert (detail.upper, detail.lower) == (CONFIG.boundary, 0.0)
    assert semantic.seed != detail.seed
    single = build_segment(replace(CONFIG, experts="single"), "semantic")
    assert (single.upper, single.lower) == (1.0, 0.0)


def test_two_full_experts_share_nothing():
    first = _stage().student
    stage = _stage(replace(CONFIG, experts="dual_full"), "detail", first)
    assert all(p.requires_grad for p in stage.student.parameters())
    assert not {id(p) for p in stage.student.parameters()} & {id(p) for p in first.parameters()}


def test_each_of_two_networks_is_guided_by_its_own_scale(monkeypatch):
    asked = []
    guide = stages.guide_teacher
    monkeypatch.setattr(stages, "guide_teacher", lambda *given: asked.append(given[2]) or guide(*given))
    config = replace(CONFIG, experts="dual_full", guidance_scale=4.0, guidance_scale_2=3.0)
    _stage(config, "detail", _stage(config).student)
    assert asked == [4.0, 3.0]


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
    figures = dict(_run(_stage(name="detail", semantic=_stage().student)))[4]
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


def test_a_grid_too_coarse_for_a_boundary_is_refused():
    for num_intervals in (2, 3):
        grid = TimeGrid(num_intervals)
        times = grid.times.tolist()[1:-1]
        with pytest.raises(InvalidValue, match="at least 4"):
            propose_boundary(grid, times, [1.0] * len(times))
    grid = TimeGrid(4)
    assert propose_boundary(grid, grid.times.tolist()[1:-1], [1.0, 0.1, 0.1]) == pytest.approx(0.5)


def test_the_analysis_keeps_to_the_micro_batch_and_the_figures_do_not_depend_on_it(tmp_path):
    _teacher().transformer.save_pretrained(tmp_path)
    found = []
    for micro_batch in (4, 2):
        semantic = replace(CONFIG.semantic, micro_batch=micro_batch)
        config, sizes = replace(CONFIG, teacher=str(tmp_path), semantic=semantic), set()
        forward = WanField.forward

        def watched(self, x_t, t, text, sizes=sizes, forward=forward):
            sizes.add(len(x_t))
            return forward(self, x_t, t, text)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WanField, "forward", watched)
            found.append(analyse(config, _row, 8, report=lambda line: None))
        assert max(sizes) == 2 * micro_batch  # with and without text, for guidance
    for key in ("loss", "gradient", "change"):
        ours, theirs = (torch.tensor(one[key]) for one in found)
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    result = found[0]  # every probed time is watched
    assert len(result["loss"]) == len(result["steps"]) == len(result["gradient"])
    assert all(len(row) == len(result["times"]) for row in result["loss"])
    assert len(result["change"]) == len(result["change_times"]) == CONFIG.grid.num_intervals - 1
    assert 0 < result["boundary"] < 1


def test_an_analysis_on_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match=r"scale\.use_gpu"):
        analyse(replace(CONFIG, scale=ScaleConfig(num_workers=1, use_gpu=True)), _row, 8, report=print)
