"""What an engine is reckoned to hold at its peaks, against the tensors that two workers really have."""

import pytest
from gloo_ranks import run_ranks
from holding_cases import ENGINES, everything, planned

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.fixture(scope="module")
def found():
    return run_ranks(everything, 2, list(ENGINES))


@pytest.mark.parametrize("name", ENGINES)
def test_peaks_of_a_step_are_as_reckoned(found, name):
    """The step to 3 %; a backward pass to 5 %, as gloo's threads let go of tensors when they come to it."""
    expected = planned(ENGINES[name], 2)
    for rank in found:
        really = rank[name]
        assert really["step"] == pytest.approx(expected["step"], rel=0.03)
        most = max(really["forward"], really["backward"], really["step"])
        assert most == pytest.approx(expected["all"], rel=0.05)
