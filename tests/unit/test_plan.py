import json
import pickle
from fractions import Fraction
from itertools import islice, pairwise

import pytest

from raydistill.errors import InvalidValue
from raydistill.trajectories.plan import Item, Plan, Source


def source(name, num_rows, weight=1.0, digest="d"):
    return Source(name=name, num_rows=num_rows, weight=weight, digest=digest)


THREE = (source("pexels", 37, 0.3), source("sprites", 100, 0.5), source("webvid", 10, 0.2))


def plan_of(sources, seed=7, global_batch=24):
    return Plan(seed=seed, global_batch=global_batch, sources=tuple(sources))


def rows(plan, indices):
    return [plan.item(g).row for g in indices]


def proportions(*weights):
    plan = plan_of(source(f"source-{i}", 5, weight) for i, weight in enumerate(weights))
    return list(plan.proportions.values())


def test_golden_values():
    """The same plan chooses the same rows for ever: resumed runs depend on it."""
    plan = plan_of(THREE)
    assert "".join(plan.item(g).source[0] for g in range(20)) == "spswpsswpsspswpsswps"
    assert rows(plan, range(8)) == [88, 25, 84, 7, 13, 19, 38, 2]
    assert plan.item(123456) == Item(index=123456, source="sprites", epoch=617, row=18)


def test_sources_beside_it_do_not_reshuffle_a_source():
    plan, alone = plan_of(THREE), plan_of(THREE[:1])
    blended = [item.row for item in map(plan.item, range(200)) if item.source == "pexels"]
    assert rows(alone, range(len(blended))) == blended


def test_seed_and_epoch_change_the_order_and_the_global_batch_does_not():
    plans = [plan_of(THREE[1:2], seed=seed) for seed in (1, 2)]
    orders = {tuple(rows(plan, range(start, start + 100))) for plan in plans for start in (0, 100)}
    assert len(orders) == 4
    assert rows(plan_of(THREE, global_batch=6), range(99)) == rows(plan_of(THREE), range(99))


def test_shares_of_workers_tile_the_step():
    plan = plan_of(THREE)
    assert [plan.indices(2, rank, 2) for rank in range(2)] == [range(48, 60), range(60, 72)]
    assert [plan.indices(0, rank, 4) for rank in range(4)] == [range(n, n + 6) for n in (0, 6, 12, 18)]


@pytest.mark.parametrize("world_size", [5, 48, 0, -1])
def test_a_batch_that_does_not_divide(world_size):
    with pytest.raises(InvalidValue, match="global_batch"):
        plan_of(THREE).indices(0, 0, world_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: source("", 1), "name"),
        (lambda: source("a", 0), "num_rows"),
        (lambda: source("a", 1, 0.0), "weight"),
        (lambda: source("a", 1, float("nan")), "weight"),
        (lambda: source("a", 1, float("inf")), "weight"),
        (lambda: plan_of(THREE, global_batch=0), "global_batch"),
        (lambda: plan_of(THREE, seed=-1), "seed"),
        (lambda: plan_of([]), "one or more"),
        (lambda: plan_of([source("a", 1), source("a", 2)]), "different names"),
        (lambda: plan_of([source("a", 1, 1.0), source("b", 1, 3.14159265)]), "for example"),
        (lambda: plan_of([source("a", 1, 1e-7), source("b", 1)]), "for example"),
        (lambda: plan_of(THREE).item(-1), "0 or more"),
    ],
)
def test_values_that_make_no_plan(make, message):
    with pytest.raises(InvalidValue, match=message):
        make()


def test_weights_are_taken_as_written():
    assert proportions(0.8, 0.2) == [Fraction(4, 5), Fraction(1, 5)]
    assert proportions(0.1, 0.2, 0.3) == [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)]
    assert proportions(1 / 3, 2 / 3) == [Fraction(1, 3), Fraction(2, 3)]
    assert proportions(12000.0, 500.0) == [Fraction(24, 25), Fraction(1, 25)]


def test_the_blend_where_taking_the_largest_deficit_fails():
    """That rule is off by 1.08 here."""
    parts = (5, 33, 1, 33, 1)
    plan = plan_of(source(f"source-{i}", 5, part) for i, part in enumerate(parts))
    order, worst = [plan.item(g).source for g in range(73)], 0.0
    for n in range(74):
        worst = max(abs(order[:n].count(f"source-{i}") - n * parts[i] / 73) for i in range(5)) if n else worst
        assert worst <= 1 - 1 / 8


def test_every_order_of_three_rows_occurs_equally_often():
    plan, orders = plan_of([source("a", 3)]), {}
    for epoch in range(3000):
        order = tuple(rows(plan, range(3 * epoch, 3 * epoch + 3)))
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 6
    assert (
        sum((n - 500) ** 2 / 500 for n in orders.values()) < 24
    )  # chi-squared, 5 degrees of freedom: p = 2e-4


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_source():
    order = rows(plan_of([source("a", 1000)]), range(1000))
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12


def test_large_sources_take_no_memory():
    assert len(set(rows(plan_of([source("a", 10**15)]), range(1000)))) == 1000


def test_substitutes_are_the_other_rows_of_the_source():
    plan = plan_of(THREE[2:])
    for g in range(20):
        others = list(plan.substitutes(g))
        assert sorted([plan.item(g).row, *others]) == list(range(10))
        assert list(plan_of(THREE[2:]).substitutes(g)) == others
    assert list(plan_of([source("a", 1)]).substitutes(0)) == []
    assert len(list(islice(plan_of([source("a", 10**15)]).substitutes(0), 16))) == 16


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (plan_of(THREE), []),
        (plan_of(THREE, seed=8), ["seed"]),
        (plan_of(THREE, global_batch=12), ["global_batch"]),
        (plan_of([*THREE[:2], source("webvid", 11, 0.2)]), ["sources"]),
        (plan_of([*THREE[:2], source("webvid", 10, 0.4)]), ["sources"]),
        (plan_of([*THREE[:2], source("webvid", 10, 0.2, "other")]), ["sources"]),
        (plan_of(THREE[:2]), ["sources"]),
    ],
)
def test_a_state_says_what_another_plan_has_different(other, differs):
    """After JSON, as a checkpoint compares it; the step alone moves."""
    ours, theirs = (json.loads(json.dumps(plan.state(3))) for plan in (plan_of(THREE), other))
    assert [name for name in ours if ours[name] != theirs[name]] == differs
    assert plan_of(THREE).state(17) == plan_of(THREE).state(3) | {"step": 17}


def test_plans_travel_light():
    plan = plan_of([source("a", 10, 12345.0), source("b", 10, 67891.0)])
    plan.item(0)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len(pickle.dumps(plan)) < 1000
