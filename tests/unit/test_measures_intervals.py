"""Intervals hold the truth as often as they say, and differences are paired."""

from dataclasses import replace

import numpy as np
import pytest

from raydistill.evaluation import intervals


def test_weights_are_shares_and_follow_the_seed():
    weights = intervals.clip_weights(30, seed=3, num_draws=50)
    assert weights.shape == (50, 30)
    assert weights.sum(axis=1) == pytest.approx(1)
    assert (weights == intervals.clip_weights(30, seed=3, num_draws=50)).all()
    assert (weights != intervals.clip_weights(30, seed=4, num_draws=50)).any()


def test_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    random, weights = np.random.default_rng(0), intervals.clip_weights(60)
    found = [intervals.mean(random.normal(2.0, 1.0, 60), weights).estimate() for _ in range(300)]
    covered = np.mean([one.low <= 2.0 <= one.high for one in found])
    assert 0.91 <= covered <= 0.98
    assert np.mean([one.high - one.low for one in found]) == pytest.approx(2 * 1.96 / 60**0.5, rel=0.06)


@pytest.mark.parametrize("students", [2, 3, 5])
def test_interval_over_a_handful_of_training_seeds_covers_too(students):
    random, weights = np.random.default_rng(students), intervals.clip_weights(80)
    covered = []
    for _ in range(300):
        ability = random.normal(0.6, 0.1, size=(students, 1))  # seeds differ far more than clips
        found = intervals.mean(ability + random.normal(0, 0.05, (students, 80)), weights, "kind").estimate()
        covered.append(found.low <= 0.6 <= found.high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_a_difference_of_two_kinds_has_the_degrees_of_freedom_of_both():
    """Stretching each side alone would be half as wide again as need be, and decide next to nothing."""
    random, weights, covered, widths = np.random.default_rng(1), intervals.clip_weights(40), [], []
    for _ in range(300):
        kinds = [random.normal(0.6, 0.1, (3, 1)) + random.normal(0, 0.02, (3, 40)) for _ in range(2)]
        found = intervals.difference(
            *(intervals.mean(v, weights, k) for k, v in zip("ab", kinds, strict=True))
        )
        assert 2 <= found.dof <= 4
        covered.append(found.estimate().low <= 0 <= found.estimate().high)
        widths.append(found.estimate().high - found.estimate().low)
    assert 0.91 <= np.mean(covered) <= 0.98
    spread = 0.1 * (2 / 3) ** 0.5
    assert np.median(widths) == pytest.approx(2 * 2.776 * spread, rel=0.2)


def test_students_that_stand_on_both_sides_lend_their_freedom_once():
    weights = intervals.clip_weights(40)
    values = np.random.default_rng(0).normal(size=(3, 40))
    one, two = intervals.mean(values, weights, "a"), intervals.mean(values**2, weights, "a")
    assert intervals.difference(one, two).dof == 2
    single = intervals.mean(values[0], weights, "b")
    assert intervals.difference(one, single).dof == 2
    assert intervals.difference(single, single).dof == np.inf


def test_an_interval_stays_within_what_is_possible_and_shares_never_seen_have_a_width():
    weights = intervals.clip_weights(100)
    ability = np.array([[1.0], [0.9], [1.0]]) + np.zeros((3, 100))
    figure = replace(intervals.mean(ability, weights, "a"), limits=(0.0, 1.0))
    assert figure.estimate().high == 1.0
    none, gone = (intervals.mean(np.zeros((3, 100)), weights, key) for key in "ab")
    apart = intervals.difference(none, gone).estimate()
    assert (apart.low, apart.high) == (0, 0)
    wide = intervals.of_shares(apart, 100)
    assert (wide.low, wide.value, wide.high) == (-3, 0, 3)
    assert intervals.of_shares(replace(apart, high=0.5)).low == 0


def test_one_student_says_that_it_is_one():
    found = intervals.mean(np.arange(10.0), intervals.clip_weights(10))
    assert (found.num_seeds, found.num_clips, found.value) == (1, 10, 4.5)
    assert intervals.mean(np.zeros((3, 10)), intervals.clip_weights(10)).num_seeds == 3


def paired_difference(a, b):
    """Mean of a minus mean of b over the same clips; each (n,) or (students, n)."""
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    weights = intervals.clip_weights(a.shape[1])
    return intervals.difference(intervals.mean(a, weights, "a"), intervals.mean(b, weights, "b")).estimate()


def test_pairing_removes_what_clips_have_in_common():
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, 200)  # some clips are hard for every sampler
    a, b = hard + random.normal(0.5, 0.2, 200), hard + random.normal(0, 0.2, 200)
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx((a - b).mean())
    assert 0.4 < paired.low < paired.high < 0.6
    alone = intervals.mean(a, intervals.clip_weights(200)).estimate()
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_difference_of_a_sampler_to_itself_is_exactly_zero():
    a = np.random.default_rng(0).normal(size=50)
    found = paired_difference(a, a)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_students_of_two_kinds_are_not_paired_with_each_other():
    students = np.random.default_rng(0).normal(size=(3, 1)) + np.zeros((3, 50))
    found = paired_difference(students, students)
    assert found.low < -0.5 < 0.5 < found.high


def test_other_clips_cannot_be_paired():
    for how in (intervals.ratio, intervals.difference):
        with pytest.raises(ValueError, match="not paired: 10 clips"):
            how(*(intervals.mean(np.ones(n), intervals.clip_weights(n)) for n in (10, 11)))


def test_ratio_of_medians_withstands_a_disturbed_round():
    slow, fast = [2.0, 2.1, 1.9, 2.0, 9.0, 2.05, 1.95], [0.1, 0.11, 0.1, 0.1, 0.1, 0.1, 0.09]
    found = intervals.ratio(intervals.median(slow), intervals.median(fast)).estimate()
    assert found.value == pytest.approx(20)
    assert 17 < found.low <= 20 <= found.high < 30
