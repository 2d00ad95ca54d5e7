import pytest
import torch

from raydistill import draws


def test_golden_values():
    """What (seed, index, purpose) draws never changes: runs and their resumes depend on it."""
    noise = draws.noise(7, [0, 1000003], "noise", (3,))
    expected = [
        [0.36332812905, -0.02032722346, -0.59596747159],
        [2.76433205604, 1.79048836231, 0.23893512785],
    ]
    assert torch.allclose(noise, torch.tensor(expected), rtol=0, atol=1e-7)
    uniform = [float.hex(u) for u in draws.uniform(7, [0, 1, 2**40], "time").tolist()]
    assert uniform == ["0x1.d7e63876c5f60p-5", "0x1.0e1c9c355490fp-1", "0x1.49f68879d3f50p-5"]
    assert draws.integers(7, range(8), "time", 25).tolist() == [17, 16, 6, 23, 10, 6, 13, 16]


def test_shapes_and_types():
    index = torch.arange(5)
    assert draws.noise(0, index, "noise", (4, 16, 4, 4)).shape == (5, 4, 16, 4, 4)
    assert draws.noise(0, index, "noise", (2,)).dtype == torch.float32
    assert draws.uniform(0, index, "flag").dtype == torch.float64
    assert draws.integers(0, index, "time", 3).dtype == torch.int64


def test_of_nothing_is_empty():
    nothing = torch.empty(0, dtype=torch.int64)
    assert draws.noise(0, nothing, "noise", (2, 3)).shape == (0, 2, 3)
    assert draws.uniform(0, nothing, "flag").shape == (0,)
    assert draws.integers(0, nothing, "time", 3).shape == (0,)


def test_integers_of_an_empty_range():
    with pytest.raises(ValueError, match="high"):
        draws.integers(0, [0], "time", 0)


def test_global_random_state_plays_no_part():
    torch.manual_seed(0)
    before, state = draws.noise(3, [5], "noise", (8,)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(draws.noise(3, [5], "noise", (8,)), before)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "other", [(8, "noise", 0), (7, "time", 0), (7, "noise", 1)], ids=["seed", "purpose", "index"]
)
def test_independent_in_every_part_of_the_key(other):
    seed, purpose, by = other
    index = torch.arange(64)
    a = draws.noise(7, index, "noise", (256,)).flatten()
    b = draws.noise(seed, index + by, purpose, (256,)).flatten()
    correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert abs(correlation) < 4 / len(a) ** 0.5


def test_distributions():
    index = torch.arange(4000)
    noise = draws.noise(1, index, "noise", (8,)).flatten().double()
    assert abs(float(noise.mean())) < 4 / len(noise) ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / len(noise)) ** 0.5
    uniform = draws.uniform(1, index, "flag")
    assert abs(float(uniform.mean()) - 0.5) < 4 / (12 * len(uniform)) ** 0.5
    assert 0 <= float(uniform.min()) < 0.01
    assert 0.99 < float(uniform.max()) < 1
    counts = draws.integers(1, index, "time", 5).bincount()
    assert len(counts) == 5
    assert float(((counts - 800) ** 2 / 800).sum()) < 20  # chi-squared, 4 degrees of freedom: p = 5e-4
