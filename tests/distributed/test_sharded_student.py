"""At ZeRO 3 a student is read in shards and its average is divided; it learns the same, number for number."""

import numpy as np
import pipeline_cases
import pytest
from gloo_ranks import run_ranks
from student_cases import CASES, every_case, taken_up

from raydistill.config.distill import DistillConfig, TargetConfig
from raydistill.config.engine import EngineConfig

pytestmark = [pytest.mark.distributed, pytest.mark.long]

SHAPES = ((16, 3, 4, 6), (20, 16))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded-student")
    return pipeline_cases.save(folder / "wan", "wan21"), SHAPES, str(folder)


@pytest.fixture(scope="module")
def ranks(place):
    ways = [run_ranks(every_case, 2, *place, apart) for apart in (False, True)]
    return [whole | apart for whole, apart in zip(*ways, strict=True)]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_the_same_bit_for_bit(ranks, case):
    whole, apart = (ranks[0][case, how][0] for how in (False, True))
    assert whole.keys() == apart.keys()
    for stage, expected in whole.items():
        assert any(name.startswith("student/exp_avg/") for name in expected)
        kept = CASES[case].get("average_decay") != 0.0
        assert any(name.startswith("averages/average/") for name in expected) == kept
        same(apart[stage], expected)


@pytest.mark.parametrize("case", CASES)
def test_each_worker_reads_half_of_the_student(ranks, case):
    for rank in ranks:
        for apart in (False, True):
            for part, *_ in rank[case, apart][1].values():
                assert part == pytest.approx(0.5 if apart else 1.0, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_each_worker_holds_half_of_the_average(ranks, case):
    for rank in ranks:
        for _, average, count, _ in rank[case, True][1].values():
            kept = CASES[case].get("average_decay") != 0.0
            assert average == pytest.approx(4 * count / 2 * kept, rel=0.05)


def test_each_trained_network_has_its_own_stage(ranks):
    held = ranks[0]["dual on a LoRA, bf16, sharded teacher", True][1]
    assert held["semantic"][3] == {"student": 3}
    assert held["detail"][3] == {"student": 3, "critic": 2}


def test_a_run_in_shards_is_taken_up(ranks, place):
    for found, expected in run_ranks(taken_up, 2, *place):
        same(found, expected)


def test_a_target_that_is_a_moving_average_needs_a_whole_student():
    at_3, online = EngineConfig(zero_stage=3), TargetConfig(kind="online")
    assert DistillConfig(engine=at_3, target=online).student_in_shards
    assert not DistillConfig(engine=at_3).student_in_shards
    assert not DistillConfig(target=online).student_in_shards
