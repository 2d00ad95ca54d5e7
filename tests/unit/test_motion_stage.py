"""The motion student's stage: who learns, who does not; batching, guidance and lanes change nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
import unet_cases
from motion_cases import (
    GLOBAL,
    OBJECTIVE,
    STEPS,
    batches,
    config_of,
    norms,
    one_batch,
    plain,
    stage_of,
    teacher,
    write_weights,
)

from raydistill.config.distill import MixConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, SemanticConfig
from raydistill.consistency.losses import pseudo_huber
from raydistill.consistency.schedule import VariancePreserving
from raydistill.consistency.solver import euler, guided
from raydistill.experts.loop import distill, draw
from raydistill.experts.semantic import consistency_pair, starting_point, teacher_step
from raydistill.experts.stages import Given, build_stage
from raydistill.models.frame_critic import pool_text
from raydistill.models.text import null_text
from raydistill.models.unet import UNetField
from raydistill.types import Batch, Origin


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def trained(config, net=None, **feed):
    stage, figures = stage_of(config, net), []
    how = {"report_every": 1, "save_every": STEPS, "save": lambda step: None}
    batch = config.motion.micro_batch
    distill(stage, batches(batch, **feed), report=lambda step, values: figures.append(values), **how)
    return stage, figures


def learned(stage):
    """Every role's weights, and the averages."""
    found = {role: engine.weights() for role, engine in stage.engines().items()}
    return found | {
        f"slow {name}": slow.weights for name, (_, slow) in stage.parts()["averages"].copies.items()
    }


def test_each_turn_reaches_its_own_weights_alone(weights):
    net = teacher()
    stage = stage_of(config_of(weights), net)
    student = {n: p for n, p in stage.student.named_parameters() if p.requires_grad}
    modules = {name: one.engine.module for name, one in stage.companions.items()}
    assert set(modules) == {"motion_head", "image_critic"}
    assert all(".lora_" in name for name in student)
    losses, seen = draw(stage, one_batch(range(GLOBAL)))
    stage.engine.backward(losses.total)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.values())
    frozen = [*net.parameters(), *stage.target.net.parameters()]
    everything = [p for module in modules.values() for p in module.parameters()]
    assert all(p.grad is None for p in (*frozen, *everything))
    before = {n: p.grad.clone() for n, p in student.items() if p.grad is not None}
    for name, companion in stage.companions.items():
        companion.engine.backward(companion.turn(seen[name]).total)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in modules[name].parameters())
    assert all(torch.equal(student[n].grad, g) for n, g in before.items())
    assert all(p.grad is None for p in frozen)


def test_the_adapter_off_is_the_teacher_before_and_after_training(weights):
    net = teacher()
    before = copy.deepcopy(net)
    stage, _ = trained(config_of(weights), net)
    x, t, text = torch.randn(2, 4, 4, 4, 4), torch.tensor([0.3, 0.9]), torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(net(x, t, text), before(x, t, text))
        assert not torch.allclose(stage.student(x, t, text), net(x, t, text))
    shared = dict(net.named_parameters())
    own = dict(stage.student.named_parameters())
    assert all(
        p.data_ptr() == own[n.replace("weight", "base_layer.weight") if n not in own else n].data_ptr()
        for n, p in shared.items()
        if n.endswith("weight")
    )


def test_gradient_accumulation_changes_no_weight_of_any_role(weights):
    whole, first = trained(config_of(weights))
    parts, second = trained(config_of(weights, micro_batch=GLOBAL // 4))
    for role, expected in learned(whole).items():
        for name, value in learned(parts)[role].items():
            torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5, msg=f"{role} {name}")
    losses = {key for key in first[0] if key.startswith("loss/")}
    assert losses == {
        *("loss/consistency", "loss/motion", "loss/appearance", "loss/motion_head"),
        *("loss/image_critic_real", "loss/image_critic_fake", "loss/gradient_penalty"),
    }
    for ours, theirs in zip(first, second, strict=True):
        assert {k: ours[k] for k in losses} == pytest.approx({k: theirs[k] for k in losses}, rel=1e-3)
    assert norms(whole) == pytest.approx(norms(parts), rel=1e-3)


def test_the_learned_representation_begins_as_the_plain_distance(weights):
    objective = plain(OBJECTIVE, motion=1.0)
    stage = stage_of(config_of(weights, objective=objective))
    losses, _ = draw(stage, one_batch(range(4)))
    torch.testing.assert_close(losses.terms["motion"].value, losses.terms["consistency"].value)


def test_a_fixed_representation_needs_no_companion(weights):
    objective = plain(
        OBJECTIVE, motion=1.0, consistency=0.0, representation="difference", normalise_jump=False
    )
    stage = stage_of(config_of(weights, objective=objective))
    assert not stage.companions
    batch = one_batch(range(4))
    losses, _ = draw(stage, batch)
    pair = consistency_pair(stage.nets, stage.segment, batch)
    ours, theirs = (x.diff(dim=2) for x in (pair.guess, pair.goal))
    torch.testing.assert_close(
        losses.terms["motion"].value, pseudo_huber(ours, theirs, objective.huber_c).detach()
    )
    assert set(losses.terms) == {"motion"}


def test_a_recorded_pair_is_the_freshly_computed_one(weights):
    """The draw on recorded states equals that on the videos they were recorded from, without a pass."""
    config = replace(config_of(weights), mix=MixConfig())
    stage = stage_of(config)
    fresh = one_batch(range(4), recorded=False)
    fresh = replace(fresh, origin=None)
    t, r, _ = stage.segment.times(fresh.index)
    x_t = starting_point(stage.nets, stage.segment, fresh, t)
    x_r = teacher_step(stage.nets, stage.segment, fresh, x_t, (t, r))
    origin = torch.full((4,), int(Origin.RECORDED))
    recorded = replace(fresh, latents=x_t, x_r=x_r, origin=origin)
    expected = draw(stage, fresh)[0].terms
    passes = []
    nets = replace(stage.nets, guided_by=lambda *_: passes.append(1), teacher=lambda *_: passes.append(1))
    stage.nets = nets
    found = draw(stage, recorded)[0].terms
    assert not passes
    for name in expected:
        torch.testing.assert_close(found[name].value, expected[name].value)


def test_a_mixed_batch_asks_the_teacher_for_what_is_not_recorded(weights):
    stage = stage_of(
        replace(config_of(weights), mix=MixConfig(real_share=0.5, recorded_share=0.5, trajectories="paths"))
    )
    sizes = []
    by = stage.nets.guided_by
    stage.nets = replace(
        stage.nets, guided_by=lambda x, t, text, w: (sizes.append(len(x)), by(x, t, text, w))[1]
    )
    batch = one_batch(range(4), recorded=True)
    pair = consistency_pair(stage.nets, stage.segment, batch)
    assert sizes == [2]
    videos = Batch(batch.index[::2], batch.latents[::2], batch.text[::2])
    alone = consistency_pair(stage.nets, stage.segment, videos)
    torch.testing.assert_close(pair.goal[::2], alone.goal)
    torch.testing.assert_close(pair.guess[::2], alone.guess)


def test_simulated_samples_start_at_the_students_own_clip_of_the_caption(weights):
    stage = stage_of(config_of(weights))
    batch = one_batch(range(4))
    t, _, _ = stage.segment.times(batch.index)
    x_t = starting_point(stage.nets, stage.segment, batch, t)
    other = replace(batch, latents=torch.where(batch.origin.view(-1, 1, 1, 1, 1) == 0, batch.latents, 9.0))
    assert torch.equal(starting_point(stage.nets, stage.segment, other, t), x_t)  # their latents are not read
    pure = stage.segment.noise(batch.index, batch.latents, "simulated noise")
    one = torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        x0 = pure - stage.nets.target(pure, one, batch.text)
    made = stage.segment.schedule.add_noise(x0, stage.segment.noise(batch.index, x0), t)
    torch.testing.assert_close(x_t[1::2], made[1::2])


def test_at_full_noise_the_start_is_noise_alone_on_every_schedule(weights):
    stage = stage_of(replace(config_of(weights), mix=MixConfig()))
    segment = replace(stage.segment, schedule=VariancePreserving.scaled_linear())
    batch = replace(one_batch(range(2)), origin=None)
    t = torch.tensor([1.0, 0.98], dtype=torch.float64)
    x_t = starting_point(stage.nets, segment, batch, t)
    noise = segment.noise(batch.index, batch.latents)
    assert torch.equal(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], segment.schedule.add_noise(batch.latents, noise, t)[1])


def test_every_sample_has_a_guidance_scale_of_its_own_in_the_range(weights):
    stage = stage_of(config_of(weights))
    scales = stage.segment.scales(torch.arange(400))
    assert 1.5 <= scales.min() < 1.6
    assert 2.9 < scales.max() < 3.0
    batch = replace(one_batch(range(3)), origin=None)
    t, r, _ = stage.segment.times(batch.index)
    ours = teacher_step(stage.nets, stage.segment, batch, batch.latents, (t, r))
    for i in range(3):
        field = guided(teacher().requires_grad_(False), null_text(batch.text), float(scales[i]))
        here = slice(i, i + 1)
        alone = euler(stage.segment.schedule, field, batch.latents[here], t[here], r[here], batch.text[here])
        torch.testing.assert_close(ours[here], alone, rtol=1e-4, atol=1e-5)


def test_a_run_taken_up_ends_as_the_unbroken_one(weights, tmp_path):
    config = config_of(weights)
    unbroken, _ = trained(config)
    broken, feed = stage_of(config), batches()
    short = replace(broken, config=replace(broken.config, num_steps=2))

    def save(step):
        for name, part in short.parts().items():
            part.save(tmp_path / name)

    distill(short, feed, report_every=9, save_every=9, report=lambda *_: None, save=save)
    again = stage_of(config)
    for name, part in again.parts().items():
        part.load(tmp_path / name)
    distill(again, feed, report_every=9, save_every=9, report=lambda *_: None, save=lambda step: None)
    for role, expected in learned(unbroken).items():
        assert all(torch.equal(w, expected[n]) for n, w in learned(again)[role].items()), role


def test_frames_and_augmentation_are_keyed_by_the_sample(weights):
    judge = stage_of(config_of(weights)).companions["image_critic"].look.__self__
    batch = one_batch(range(6))
    leaf = batch.latents
    picked = judge._picked(batch.index, leaf, 2)
    assert picked.shape == (6, 2)
    assert (picked[:, 0] != picked[:, 1]).all()
    assert torch.equal(judge._picked(batch.index[2:4], leaf[2:4], 2), picked[2:4])
    assert len({tuple(row) for row in picked.tolist()}) > 1


def test_dcms_experts_take_the_representation_and_the_image_critic(weights):
    motion = config_of(weights)
    sizes = {"num_steps": STEPS, "global_batch": GLOBAL, "micro_batch": GLOBAL}
    sizes |= {"optimizer": motion.motion.optimizer, "appearance": motion.motion.appearance}
    config = replace(
        motion,
        experts="dual",
        mix=MixConfig(),
        semantic=SemanticConfig(**sizes, objective=ObjectiveConfig(consistency=0.0, motion=1.0)),
        detail=DetailConfig(**sizes, objective=ObjectiveConfig(appearance=0.2), lora_rank=2),
    )
    given = Given(teacher(), torch.zeros(1, 4, 4, 4, 4), torch.zeros(1, 3, 32), teacher(1))
    batch, seen = replace(one_batch(range(GLOBAL)), origin=None), {}
    for name, companion in (("semantic", "motion_head"), ("detail", "image_critic")):
        means = (torch.zeros(32), torch.zeros(32))
        stage = build_stage(
            config,
            name,
            replace(given, semantic=given.semantic if name == "detail" else None, caption_means=means),
        )
        assert set(stage.companions) == {companion}
        losses, kept = draw(stage, batch)
        stage.engine.backward(losses.total)
        assert stage.companions[companion].turn(kept[companion]).total.isfinite()
        seen[name] = set(losses.terms)
    assert seen == {"semantic": {"motion"}, "detail": {"consistency", "appearance"}}


@pytest.mark.parametrize("kind", ["ms", "ad"])
def test_a_noise_predicting_unet_is_distilled_through_the_same_jump(weights, kind):
    net = UNetField(unet_cases.unet3d() if kind == "ms" else unet_cases.unet_motion()).eval()
    rng = torch.Generator().manual_seed(0)
    for p in net.parameters():  # off the start, where layers with dropout give zeros
        p.data.add_(0.02 * torch.randn(p.shape, generator=rng))
    before = {n: p.clone() for n, p in net.named_parameters()}
    config = config_of(weights, objective=plain(OBJECTIVE, motion=1.0, normalise_jump=False))
    schedule = VariancePreserving.scaled_linear()
    latents, text = torch.zeros(1, *unet_cases.SHAPE), torch.zeros(1, *unet_cases.TEXT)
    stage = build_stage(config, "motion", Given(net, latents, text, schedule=schedule))
    x, words = unet_cases.inputs(GLOBAL)
    batch = Batch(torch.arange(GLOBAL), x, words, torch.arange(GLOBAL) % 2)
    pair = consistency_pair(stage.nets, stage.segment, batch)
    again = consistency_pair(stage.nets, stage.segment, batch)
    assert torch.equal(pair.guess, again.guess)
    assert torch.equal(pair.goal, again.goal)
    t, _, s = stage.segment.times(batch.index)
    x_t = starting_point(stage.nets, stage.segment, batch, t)
    with torch.no_grad():
        torch.testing.assert_close(
            pair.guess.detach(), schedule.to_x0(stage.student(x_t, t, words), x_t, t), rtol=1e-3, atol=1e-3
        )
    assert s.tolist() == [0.0] * GLOBAL
    distill(
        stage,
        iter([batch] * STEPS),
        report_every=9,
        save_every=9,
        report=lambda *_: None,
        save=lambda n: None,
    )
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    moved = [p for n, p in stage.student.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert moved


def test_the_image_critics_two_turns_are_the_formulas(weights):
    """Score of the generator; hinge on real and on generated frames; each lane's captions less their mean."""
    judge = stage_of(config_of(weights)).companions["image_critic"].look.__self__
    judge = replace(judge, config=replace(judge.config, augment=False, gradient_penalty=0.0), weight=0.7)
    batch = one_batch(range(4))
    pair = consistency_pair(stage_of(config_of(weights)).nets, stage_of(config_of(weights)).segment, batch)
    with torch.no_grad():
        said, seen = judge.look(batch, pair, batch.latents)
        turn = judge.turn(seen).terms
        fakes = judge.codec.decode_frames(batch.latents, judge._picked(batch.index, batch.latents, 2))
        asked = (pool_text(batch.text) - 0.1).repeat_interleave(2, dim=0)  # the clips' mean caption
        fake = judge.critic(judge.features(fakes.transpose(1, 2).flatten(0, 1)), asked)
        first = torch.zeros(4, 1, dtype=torch.long)
        reals = judge.codec.decode_frames(batch.images.latents, first)[:, :, 0]
        real = judge.critic(judge.features(reals), pool_text(batch.images.text))  # whose mean is 0

    def over_maps(values):
        return torch.stack([x.mean(dim=1) for x in values]).mean(dim=0)

    assert said["appearance"].weight == 0.7
    torch.testing.assert_close(said["appearance"].value, over_maps([-x for x in fake]))
    torch.testing.assert_close(turn["image_critic_real"].value, over_maps([torch.relu(1 - x) for x in real]))
    torch.testing.assert_close(turn["image_critic_fake"].value, over_maps([torch.relu(1 + x) for x in fake]))
