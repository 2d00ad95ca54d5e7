"""A teacher in shards teaches the same, number for number, and each worker holds its share of it."""

import numpy as np
import pipeline_cases
import pytest
import torch
from gloo_ranks import run_ranks
from sharding_cases import CASES, STEPS, both_ways, most_while_loading, passes

pytestmark = [pytest.mark.distributed, pytest.mark.long]

SHAPES = {"wan21": ((16, 3, 4, 6), (20, 16))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = pipeline_cases.save(tmp_path_factory.mktemp("wan"), "wan21")
    return run_ranks(both_ways, 2, folder, SHAPES["wan21"])


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_bit_for_bit(ranks, case):
    for rank in ranks:
        whole, sharded = rank[case, False], rank[case, True]
        assert len(whole["losses"]) == STEPS
        assert sharded["losses"] == whole["losses"]
        assert sharded["weights"].keys() == whole["weights"].keys()
        for name, expected in whole["weights"].items():
            np.testing.assert_array_equal(sharded["weights"][name], expected, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_each_worker_holds_half_from_the_start_and_between_steps(ranks, case):
    for rank in ranks:
        whole, sharded = rank[case, False], rank[case, True]
        assert set(whole["held"]) == {whole["whole"]}
        assert len(sharded["held"]) == STEPS + 1
        for held in sharded["held"]:
            assert held == pytest.approx(sharded["whole"] / 2, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_where_shards_stay_is_told_to_all_that_cut(ranks, case):
    """Host memory is the device's here; on a GPU they are looked at."""
    for rank in ranks:
        assert rank[case, True]["offload"] == {"host memory" in case}


TEXTS = {
    "wan21": (20, 16),
    "hunyuan": (21, 16),
    "cogvideox": (10, 16),
    "modelscope": (7, 8),
    "animatediff": (7, 8),
}


def test_every_teacher_sees_the_same_in_shards(tmp_path):
    folders = {kind: pipeline_cases.save(tmp_path / kind, kind) for kind in TEXTS}
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    inputs = {kind: (pipeline_cases.latents_of(kind), t, torch.randn(2, *TEXTS[kind])) for kind in TEXTS}
    for found in run_ranks(passes, 2, folders, inputs):
        assert found.keys() == TEXTS.keys()
        for kind, (equal, off, count, share) in found.items():
            assert equal, kind
            assert off < 1e-6, kind  # autograd adds what comes back along several ways in another order
            assert (count > 3) == (kind in ("wan21", "hunyuan", "cogvideox")), kind
            assert share == pytest.approx(0.5, rel=0.02), kind


def test_no_worker_holds_more_than_its_share_and_a_tensor_while_it_loads(tmp_path):
    net = pipeline_cases.wan_transformer(layers=4)
    net.save_pretrained(tmp_path, safe_serialization=True)
    count, largest = sum(p.numel() for p in net.parameters()), max(p.numel() for p in net.parameters())
    tables = sum(x.numel() * x.element_size() for x in net.buffers())
    for most, stays in run_ranks(most_while_loading, 2, tmp_path, torch.bfloat16):
        assert stays == pytest.approx(2 * count / 2 + tables, rel=0.05)
        assert most <= stays + (2 + 4) * largest
        assert most < 0.5 * 4 * count
