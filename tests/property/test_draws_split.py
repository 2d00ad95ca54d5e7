import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill import draws

seeds = st.integers(0, 2**63)
indices = st.lists(st.integers(0, 2**62), min_size=1, max_size=12, unique=True)


@given(seeds, indices, st.integers(0, 12), st.randoms(use_true_random=False))
def test_the_same_numbers_however_batches_are_split(seed, index, cut, random):
    """However a batch is cut and ordered, each sample draws what it draws alone."""
    shuffled = random.sample(index, len(index))
    parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
    for draw in (
        lambda i: draws.noise(seed, i, "noise", (3, 2)),
        lambda i: draws.uniform(seed, torch.tensor(i), "flag"),
        lambda i: draws.integers(seed, i, "time", 1000),
    ):
        split = torch.cat([draw(part) for part in parts])
        whole = draw(index)
        for at, i in enumerate(shuffled):
            assert torch.equal(split[at], whole[index.index(i)])


@given(seeds, st.integers(0, 2**62), st.integers(1, 2**40))
def test_integers_stay_in_range(seed, index, high):
    assert 0 <= int(draws.integers(seed, [index], "time", high)) < high
