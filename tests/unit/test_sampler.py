import json
from itertools import pairwise

import pytest
import torch

from raydistill.consistency.phases import Phases
from raydistill.consistency.schedule import DCM_GRID, RECTIFIED_FLOW, TimeGrid, VariancePreserving, diffuse
from raydistill.consistency.solver import solve
from raydistill.errors import InvalidValue, SamplingError, UnknownKey
from raydistill.models.gaussian import GaussianStudent, GaussianTeacher
from raydistill.sampler import (
    Jump,
    SamplingPlan,
    build_plan,
    keyed_noise,
    plan_times,
    sample,
    teacher_plan,
    with_head,
    with_tail,
)

GRID = TimeGrid(25)
TEACHER = GaussianTeacher(0.3, 0.7)
TEXT = torch.zeros(3, 1, 1, dtype=torch.float64)


def normal(seed, dtype=torch.float64):
    return torch.randn(
        (3, 2, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def perfect(boundary, last=0.0):
    student = GaussianStudent(TEACHER, Phases.dual(boundary, last))
    return {"semantic": student, "detail": student, "teacher": TEACHER}


def exact(x, t, s):
    return TEACHER.consistency_map(x, *(torch.full((len(x),), u, dtype=torch.float64) for u in (t, s)))


def stops(plan):
    return [plan.jumps[0].t, *(one.s for one in plan.jumps)]


def experts(plan):
    return [one.expert for one in plan.jumps]


def test_plans_of_2_4_and_8_steps():
    assert build_plan(2, 0.6, GRID).jumps == (Jump(1.0, 0.6, "semantic"), Jump(0.6, 0.0, "detail"))
    assert stops(build_plan(4, 0.6, GRID)) == [1.0, 0.8, 0.6, 0.32, 0.0]
    assert experts(build_plan(8, 0.6, GRID)) == ["semantic"] * 4 + ["detail"] * 4
    assert experts(build_plan(3, 0.6, GRID)) == ["semantic", "semantic", "detail"]


def test_dcm_four_steps_end_at_zero():
    kappa = DCM_GRID.nodes[49 - 37]
    plan = build_plan(4, kappa, DCM_GRID)
    assert [round(u, 4) for u in stops(plan)] == [1.0, 0.992, 0.9818, 0.9124, 0.0]
    assert plan.last == DCM_GRID.last


def test_the_one_step_plan_says_that_it_extrapolates():
    plan = build_plan(1, 0.6, GRID)
    assert plan.jumps == (Jump(1.0, 0.0, "semantic", extrapolates=True),)
    calls = []

    def semantic(x_t, t, text):
        calls.append(t.tolist())
        return x_t

    noise = normal(1)
    found = sample({"semantic": semantic}, RECTIFIED_FLOW, plan, noise, TEXT)
    assert calls == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(found, torch.zeros_like(noise))


def test_a_jump_over_the_boundary_is_refused_by_name():
    with pytest.raises(SamplingError, match=r"from 0\.8 to 0\.4 crosses the boundary 0\.6"):
        plan_times((1.0, 0.8, 0.4, 0.0), 0.6)
    with pytest.raises(SamplingError, match=r"boundary 0\.6"):
        SamplingPlan((Jump(1.0, 0.0, "semantic"),), boundary=0.6)


@pytest.mark.parametrize(
    "jumps",
    [
        (),
        (Jump(0.9, 0.6, "semantic"), Jump(0.6, 0.0, "detail")),
        (Jump(1.0, 0.6, "semantic"),),
        (Jump(1.0, 0.6, "semantic"), Jump(0.5, 0.0, "detail")),
        (Jump(1.0, 0.6, "semantic"), Jump(0.6, 0.6, "detail"), Jump(0.6, 0.0, "detail")),
        (Jump(1.0, 0.6, "detail"), Jump(0.6, 0.0, "detail")),
        (Jump(1.0, 0.6, "semantic"), Jump(0.6, 0.0, "semantic")),
        (Jump(1.0, 0.6, "semantic"), Jump(0.6, 0.0, "critic")),
        (Jump(1.0, 0.6, "semantic"), Jump(0.6, 0.0, "detail", extrapolates=True)),
        (Jump(1.0, 0.0, "detail", extrapolates=True),),
        (Jump(1.0, 0.0, "teacher", extrapolates=True),),
    ],
)
def test_unsound_plans_are_refused(jumps):
    with pytest.raises(SamplingError):
        SamplingPlan(jumps, boundary=0.6)


def test_a_boundary_off_the_grid_and_too_many_steps_are_refused():
    with pytest.raises(InvalidValue, match="nearest"):
        build_plan(4, 0.61, GRID)
    with pytest.raises(SamplingError, match="10 intervals"):
        build_plan(22, 0.6, GRID)
    with pytest.raises(SamplingError, match="path"):
        build_plan(4, 0.6, GRID, "random")


@pytest.mark.parametrize("boundary", [0.2, 0.6, 0.92])
def test_hand_over_between_perfect_experts_is_exact(boundary):
    noise = normal(2)
    found = sample(perfect(boundary), RECTIFIED_FLOW, build_plan(2, boundary, GRID), noise, TEXT)
    torch.testing.assert_close(found, exact(noise, 1.0, 0.0), rtol=0, atol=1e-14)


def test_the_last_jump_goes_on_from_dcms_last_time():
    kappa, noise = DCM_GRID.nodes[49 - 37], normal(2)
    fields = perfect(kappa, DCM_GRID.last)
    found = sample(fields, RECTIFIED_FLOW, build_plan(2, kappa, DCM_GRID), noise, TEXT)
    at_kappa = exact(noise, 1.0, kappa)
    velocity = (exact(at_kappa, kappa, DCM_GRID.last) - at_kappa) / (DCM_GRID.last - kappa)
    torch.testing.assert_close(found, at_kappa - kappa * velocity)


def test_the_renoising_path_ends_at_clean_data_too():
    kappa, noise = DCM_GRID.nodes[49 - 37], normal(2)
    fields = perfect(kappa, DCM_GRID.last)
    straight, again = (
        sample(fields, RECTIFIED_FLOW, build_plan(2, kappa, DCM_GRID, path), noise, TEXT)
        for path in ("deterministic", "renoise")
    )
    assert torch.equal(straight, again)  # each expert's only jump ends its phase: nothing to noise


def test_the_teachers_tail_is_euler_over_the_nodes_below_the_boundary():
    noise, plan = normal(3), with_tail(1, 0.6, GRID)
    assert experts(plan) == ["semantic"] + ["teacher"] * 15
    assert plan.passes() == 31
    assert plan.passes(tail_guided=False) == 16
    found = sample(perfect(0.6), RECTIFIED_FLOW, plan, noise, TEXT)
    expected = solve(RECTIFIED_FLOW, TEACHER, exact(noise, 1.0, 0.6), GRID.times[10:], TEXT)
    torch.testing.assert_close(found, expected)


def test_the_teachers_head_is_euler_over_the_nodes_above_it():
    noise, plan = normal(3), with_head(1, 0.6, GRID)
    assert experts(plan) == ["teacher"] * 10 + ["detail"]
    at_boundary = solve(RECTIFIED_FLOW, TEACHER, noise, GRID.times[:11], TEXT)
    found = sample(perfect(0.6), RECTIFIED_FLOW, plan, noise, TEXT)
    torch.testing.assert_close(found, exact(at_boundary, 0.6, 0.0))


def test_tails_and_heads_of_a_given_length():
    assert stops(with_tail(2, 0.6, GRID, tail_steps=3)) == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert stops(with_head(1, 0.6, GRID, head_steps=2)) == [1.0, 0.8, 0.6, 0.0]
    assert stops(with_tail(1, DCM_GRID.nodes[12], DCM_GRID))[-1] == 0.0


def test_the_teacher_alone_takes_any_number_of_steps():
    plan, noise = teacher_plan(50, GRID), normal(4)
    assert len(plan.jumps) == 50
    assert plan.passes() == 100
    found = sample({"teacher": TEACHER}, RECTIFIED_FLOW, plan, noise, TEXT)
    torch.testing.assert_close(found, solve(RECTIFIED_FLOW, TEACHER, noise, TimeGrid(50).times, TEXT))
    assert teacher_plan(2, TimeGrid(25, shift=3.0)).jumps[0].s == pytest.approx(0.75)


def test_a_single_expert_is_called_semantic():
    plan = build_plan(4, None, GRID)
    assert set(experts(plan)) == {"semantic"}
    assert plan.boundary is None
    assert build_plan(1, None, GRID).jumps == (Jump(1.0, 0.0, "semantic"),)


def test_the_renoising_path_jumps_to_the_end_of_the_phase_and_back_up():
    plan, noise = build_plan(4, 0.6, GRID, "renoise"), normal(5)
    drawn = {}

    def noise_at(k, shape):
        drawn[k] = normal(100 + k)
        assert shape == (3, 2, 3, 2, 2)
        return drawn[k]

    found = sample(perfect(0.6), RECTIFIED_FLOW, plan, noise, TEXT, noise_at=noise_at)
    assert sorted(drawn) == [1, 3]  # not after the jumps that end a phase
    t, s, r, z = (torch.full((3,), u, dtype=torch.float64) for u in (0.8, 0.6, 0.32, 0.0))
    x = diffuse(exact(noise, 1.0, 0.6), drawn[1], t, s)
    x = diffuse(exact(exact(x, 0.8, 0.6), 0.6, 0.0), drawn[3], r, z)
    torch.testing.assert_close(found, exact(x, 0.32, 0.0))


def test_keyed_noise_depends_on_the_sample_and_the_step_alone():
    whole = keyed_noise(7, torch.tensor([3, 9, 4]))(1, (3, 2, 3, 2, 2))
    assert torch.equal(keyed_noise(7, torch.tensor([9]))(1, (1, 2, 3, 2, 2))[0], whole[1])
    assert not torch.equal(keyed_noise(7, torch.tensor([9]))(2, (1, 2, 3, 2, 2))[0], whole[1])
    fields, plan, noise = perfect(0.6), build_plan(4, 0.6, GRID, "renoise"), normal(5)
    index = torch.arange(3)
    found = sample(fields, RECTIFIED_FLOW, plan, noise, TEXT, noise_at=keyed_noise(7, index))
    parts = [
        sample(fields, RECTIFIED_FLOW, plan, noise[i], TEXT[i], noise_at=keyed_noise(7, index[i]))
        for i in (slice(0, 1), slice(1, 3))
    ]
    assert torch.equal(found, torch.cat(parts))


def test_renoising_keeps_the_law_of_the_data():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 1, 1, 200, 200), generator=generator, dtype=torch.float64)
    plan = build_plan(8, 0.6, GRID, "renoise")
    found = sample(
        perfect(0.6), RECTIFIED_FLOW, plan, noise, TEXT[:1],
        noise_at=lambda k, shape: torch.randn(shape, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    assert float(found.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(found.std()) == pytest.approx(0.7, abs=0.02)


def test_the_state_keeps_its_precision_beside_a_bfloat16_network():
    kappa, seen = DCM_GRID.nodes[49 - 37], []

    def expert(name):
        def field(x_t, t, text):
            seen.append((name, x_t.dtype, text.dtype, t.dtype, t[0].item()))
            return torch.zeros_like(x_t)

        return field

    noise = normal(6, torch.float32)
    fields = {name: expert(name) for name in ("semantic", "detail")}
    found = sample(
        fields, RECTIFIED_FLOW, build_plan(4, kappa, DCM_GRID), noise, TEXT, network_dtype=torch.bfloat16
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, noise)
    # Exactly at the boundary the detail expert is asked, at a time that no dtype has rounded.
    assert [name for name, *_ in seen] == ["semantic", "semantic", "detail", "detail"]
    assert seen[2] == ("detail", torch.bfloat16, torch.bfloat16, torch.float64, kappa)


def test_missing_inputs_are_named():
    noise = normal(7)
    fields = {"semantic": TEACHER, "detail": TEACHER}
    with pytest.raises(SamplingError, match="needs teacher; given: detail, semantic"):
        sample(fields, RECTIFIED_FLOW, with_tail(1, 0.6, GRID), noise, TEXT)
    with pytest.raises(SamplingError, match="noise_at"):
        sample(perfect(0.6), RECTIFIED_FLOW, build_plan(4, 0.6, GRID, "renoise"), noise, TEXT)
    with pytest.raises(SamplingError, match="network_dtype"):
        sample(perfect(0.6), RECTIFIED_FLOW, build_plan(2, 0.6, GRID), noise.bfloat16(), TEXT)


def test_previews_are_predictions_of_the_clean_latents():
    seen = []
    noise = normal(8)
    plan = build_plan(2, 0.6, GRID)
    found = sample(perfect(0.6), RECTIFIED_FLOW, plan, noise, TEXT, on_step=lambda *args: seen.append(args))
    assert [(i, one) for i, one, _ in seen] == list(enumerate(plan.jumps))
    torch.testing.assert_close(seen[-1][2], found)  # the last jump goes to 0


def test_a_variance_preserving_teacher_samples_too():
    schedule, x0 = VariancePreserving.scaled_linear(), normal(9)

    def knows_the_answer(x_t, t, text):
        alpha, sigma = (u.view(-1, 1, 1, 1, 1) for u in (schedule.alpha(t), schedule.sigma(t)))
        return (x_t - alpha * x0) / sigma

    plan = build_plan(4, None, GRID, "renoise")
    found = sample(
        {"semantic": knows_the_answer}, schedule, plan, normal(10), TEXT, noise_at=lambda k, shape: normal(k)
    )
    torch.testing.assert_close(found, x0)


def test_plans_are_plain_json():
    plan = with_tail(2, DCM_GRID.nodes[12], DCM_GRID, "renoise", tail_steps=2)
    values = json.loads(json.dumps(plan.to_dict()))
    assert SamplingPlan.from_dict(values) == plan
    assert values["version"] == 1
    assert [one["t"] for one in values["jumps"][1:]] == [one["s"] for one in values["jumps"][:-1]]


def test_plans_that_cannot_be_read_say_why():
    values = build_plan(2, 0.6, GRID).to_dict()
    with pytest.raises(UnknownKey, match="did you mean 'path'"):
        SamplingPlan.from_dict({**values, "paht": "renoise"})
    with pytest.raises(UnknownKey, match=r"did you mean 'jumps\[0\]\.expert'"):
        SamplingPlan.from_dict({**values, "jumps": [{"t": 1.0, "s": 0.0, "exprt": "semantic"}]})
    with pytest.raises(SamplingError, match="version 2"):
        SamplingPlan.from_dict({**values, "version": 2})
    with pytest.raises(SamplingError, match="version None"):
        SamplingPlan.from_dict({"jumps": []})
    with pytest.raises(SamplingError, match="cannot be read"):
        SamplingPlan.from_dict({**values, "jumps": [{"t": 1.0, "s": 0.0}]})
    with pytest.raises(SamplingError, match="lists its jumps"):
        SamplingPlan.from_dict({**values, "jumps": 3})
    with pytest.raises(SamplingError, match="no set of named values"):
        SamplingPlan.from_dict({**values, "jumps": [[1.0, 0.0, "semantic"]]})
    with pytest.raises(SamplingError, match="cannot be read"):
        SamplingPlan.from_dict({**values, "last": "none"})


def test_sampling_is_deterministic_and_independent_of_the_batch():
    noise, fields, plan = normal(11), perfect(0.6), build_plan(4, 0.6, GRID)
    whole = sample(fields, RECTIFIED_FLOW, plan, noise, TEXT)
    parts = [sample(fields, RECTIFIED_FLOW, plan, noise[i : i + 1], TEXT[:1]) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert all(a > b for a, b in pairwise(stops(plan)))
