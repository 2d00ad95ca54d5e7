"""What an engine is reckoned to hold is what it holds, on one worker; two are in tests/distributed."""

from dataclasses import replace

import pytest
import torch
from holding_cases import ENGINES, peaks, planned
from torch import nn

from raydistill.experts.holding import holding

ALONE = ("torch", "torch, bf16", "ZeRO 0", "ZeRO 1, bf16", "ZeRO 2, bf16", "ZeRO 3")


@pytest.mark.parametrize("name", ALONE)
def test_peaks_of_a_step_are_as_reckoned(name):
    found, expected = peaks(ENGINES[name]), planned(ENGINES[name], 1)
    assert found["step"] == pytest.approx(expected["step"], rel=0.03)
    assert max(found["backward"], found["step"]) == pytest.approx(expected["all"], rel=0.03)


def test_zero_3_gathers_no_more_than_it_is_let():
    """Settings in `extra` are followed; alone nobody gathers."""
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(10_000, 10_000, bias=False) for _ in range(36)))  # 3.6e9
    layer = 10_000 * 10_000
    how = ENGINES["ZeRO 3, bf16"]
    by_default = holding(net, replace(how, extra={}), 2).gathered
    assert by_default == 2 * (200_000_000 + 50_000_000 + layer)
    assert holding(net, replace(how, extra={}), 1).gathered == 0
    far = {"stage3_max_live_parameters": 1_000_000_000, "stage3_prefetch_bucket_size": 100_000_000}
    wide = replace(how, extra={"zero_optimization": far})
    assert holding(net, wide, 2).gathered == 2 * (1_100_000_000 + layer)
