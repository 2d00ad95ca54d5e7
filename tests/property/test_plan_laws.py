from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raydistill.trajectories.plan import Plan, Source

weights = st.one_of(st.integers(1, 40).map(float), st.decimals("0.1", 3, places=1).map(float))
blends = st.lists(weights, min_size=1, max_size=7)
seeds = st.integers(0, 2**63)
scales = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])


def plan_of(seed, weights, num_rows=None):
    sources = [
        Source(name=f"source-{i}", num_rows=num_rows or 3 + 5 * i, weight=weight)
        for i, weight in enumerate(weights)
    ]
    return Plan(seed=seed, global_batch=24, sources=tuple(sources))


@given(blends, st.integers(1, 400))
def test_the_blend_is_exact_at_every_prefix(weights, length):
    """Tijdeman's bound, below 1, against the weights themselves; short periods come round several times."""
    plan, k = plan_of(0, weights), len(weights)
    bound = 1 - 1 / (2 * k - 2) if k > 1 else 0
    share = [weight / sum(weights) for weight in weights]
    counts = Counter()
    for n in range(1, length + 1):
        counts[plan.item(n - 1).source] += 1
        assert all(abs(counts[f"source-{i}"] - n * share[i]) <= bound + 1e-9 for i in range(k))


@given(blends, seeds)
def test_every_row_comes_once_per_epoch(weights, seed):
    plan = plan_of(seed, weights)
    seen = Counter((item.source, item.epoch, item.row) for item in map(plan.item, range(300)))
    assert set(seen.values()) == {1}
    sizes = {source.name: source.num_rows for source in plan.sources}
    per_epoch = Counter((name, epoch) for name, epoch, _ in seen)
    newest = {name: max(epoch for other, epoch in per_epoch if other == name) for name, _ in per_epoch}
    assert all(count == sizes[name] for (name, epoch), count in per_epoch.items() if epoch < newest[name])


@given(seeds, st.integers(1, 700), st.integers(0, 5))
def test_an_epoch_is_a_permutation_whatever_the_size(seed, size, epoch):
    plan = plan_of(seed, [1.0], num_rows=size)
    epoch_of = range(epoch * size, (epoch + 1) * size)
    assert sorted(plan.item(g).row for g in epoch_of) == list(range(size))


@given(seeds, st.integers(1, 2**60), st.integers(0, 2**80))
def test_rows_stay_in_range_however_large_the_source(seed, size, g):
    assert 0 <= plan_of(seed, [1.0], num_rows=size).item(g).row < size


@given(blends, seeds, st.integers(0, 10**9), scales)
def test_any_number_of_workers_sees_the_same_global_batch(weights, seed, step, world_size):
    plan = plan_of(seed, weights)
    shares = [plan.indices(step, rank, world_size) for rank in range(world_size)]
    assert all(len(share) == 24 // world_size for share in shares)
    assert [g for share in shares for g in share] == list(range(24 * step, 24 * step + 24))


@given(blends, seeds, st.integers(0, 10**6))
def test_a_resumed_plan_goes_on_where_it_was(weights, seed, step):
    """Asking for a sample leaves nothing behind: a new plan, asked for a later one first, says the same."""
    plan, again = plan_of(seed, weights), plan_of(seed, weights)
    assert again.state(step) == plan.state(step)
    assert [again.item(g) for g in reversed(plan.indices(step, 0, 1))][::-1] == [
        plan.item(g) for g in plan.indices(step, 0, 1)
    ]
