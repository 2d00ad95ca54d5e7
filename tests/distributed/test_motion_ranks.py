"""Two gloo ranks over DeepSpeed against one torch process: student, motion head, image critic, averages."""

import numpy as np
import pytest
from gloo_ranks import run_ranks
from motion_cases import GLOBAL, on_every_engine, outcome, write_weights
from shared_memory import left_since, shared_memory

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    before = shared_memory()
    both = run_ranks(on_every_engine, 2, folder)
    assert not left_since(before)
    return both, outcome(folder, GLOBAL, recorded=True)


@pytest.mark.parametrize(("zero_stage", "rounds"), [(0, 1), (1, 4), (2, 1), (3, 4)])
def test_every_role_ends_with_the_same_weights(results, zero_stage, rounds):
    both, (alone, losses) = results
    for rank in both:
        ours, seen = rank[zero_stage, rounds]
        assert ours.keys() == alone.keys() >= {"student", "motion_head", "image_critic", "slow motion_head"}
        for role, weights in alone.items():
            for name, expected in weights.items():
                found = ours[role][name]
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=3e-5, err_msg=f"{role} {name}")
        assert {f"norm {role}" for role in ("student", "motion_head", "image_critic")} <= seen.keys()
        assert seen == pytest.approx(losses, rel=1e-3)
    assert all(
        np.array_equal(both[0][zero_stage, rounds][0][role][name], both[1][zero_stage, rounds][0][role][name])
        for role, weights in alone.items()
        for name in weights
    )
