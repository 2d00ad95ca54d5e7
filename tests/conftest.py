"""Shapes checked while testing, one thread of torch, and the same Hypothesis examples on every run."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports the package: every annotated shape in the mathematics is enforced from here on.
install_import_hook("raydistill.consistency", "beartype.beartype")

pytest.register_assert_rewrite("conformance")  # asserts of its own, in no test file

torch.set_num_threads(1)

# The first example of a process pays for imports, and machines are shared: no deadlines.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    """Let strategies build our own objects: the shape checks choose by `random` which item to look at."""
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")
