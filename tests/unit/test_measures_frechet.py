"""The Frechet distance on random features against closed forms and known damage."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from raydistill.evaluation.features import FrechetDistance, RandomFeatures, frechet, moments
from raydistill.evaluation.intervals import clip_weights
from raydistill.world import sprites


def draw(count, first):
    return np.stack([sprites.render(sprites.draw_scene(first + i)) for i in range(count)])


@pytest.fixture(scope="module")
def net():
    return RandomFeatures()


@pytest.fixture(scope="module")
def distance(net):
    return FrechetDistance(net(draw(320, 0)))


@pytest.fixture(scope="module")
def clips():
    return draw(120, 10_000)


def test_gaussians_of_one_number_have_a_closed_form():
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (400, 1)), random.normal(3, 2, (300, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet(moments(a), moments(b)) == pytest.approx(expected)


def test_agrees_with_the_textbook_formula_and_is_symmetric():
    random = np.random.default_rng(1)
    a = random.normal(size=(90, 6)) @ random.normal(size=(6, 6))
    b = random.normal(size=(80, 6)) @ random.normal(size=(6, 6)) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    textbook = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(moments(a), moments(b)) == pytest.approx(textbook)
    assert frechet(moments(b), moments(a)) == pytest.approx(textbook)
    assert frechet(moments(a), moments(a)) == pytest.approx(0, abs=1e-9)


def test_weights_mean_repetition():
    features = np.random.default_rng(2).normal(size=(5, 3))
    counts = np.array([2, 0, 1, 1, 1])
    weighted = moments(features, counts / 5)
    repeated = np.repeat(features, counts, axis=0)
    assert weighted.mean == pytest.approx(repeated.mean(axis=0))
    assert weighted.covariance == pytest.approx(np.cov(repeated.T))


def test_features_do_not_depend_on_the_batch(net, clips):
    apart = RandomFeatures(batch_size=7)(clips[:20])
    assert apart == pytest.approx(net(clips[:20]), abs=1e-5)


def test_half_of_the_first_kernels_see_only_change(net):
    first = net.kernels[0]
    still = first.sum(dim=2).abs().amax(dim=(1, 2, 3))
    assert (still[: len(first) // 2] < 1e-6).all()
    assert (still[len(first) // 2 :] > 1e-3).all()
    assert first.sum(dim=(2, 3, 4)).abs().max() < 1e-5


def test_other_real_clips_are_near_and_fewer_seem_farther(net, distance, clips):
    null = distance(net(clips))
    assert null < 6
    assert distance(net(clips[:30])) > 1.5 * null


def test_grows_with_noise_and_with_blur(net, distance, clips):
    random = np.random.default_rng(0)
    shapes = random.normal(size=clips.shape)
    noise = [distance(net(np.clip(clips + s * shapes, 0, 255).astype(np.uint8))) for s in (0, 6, 12, 24)]
    blur = [
        distance(net(gaussian_filter(clips.astype(float), (0, 0, s, s, 0)).astype(np.uint8)))
        for s in (0.01, 0.7, 1.4)
    ]
    for series in (noise, blur):
        assert all(b > 1.5 * a for a, b in pairwise(series))


def test_motion_matters_though_every_frame_is_real(net, distance, clips):
    null = distance(net(clips))
    frozen = np.repeat(clips[:, 8:9], 16, axis=1)
    cut = np.concatenate([clips[:, :8], clips[::-1, 8:]], axis=1)
    assert distance(net(frozen)) > 4 * null
    assert distance(net(cut)) > 4 * null


def test_interval_lies_around_the_distance_and_narrows_with_clips(net, distance, clips):
    features = net(clips)
    wide = distance.bootstrapped(features[:40], clip_weights(40, num_draws=100)).estimate()
    narrow = distance.bootstrapped(features, clip_weights(120, num_draws=100)).estimate()
    for one in (wide, narrow):
        assert 0 <= one.low < one.value < one.high
    assert narrow.high - narrow.low < 0.7 * (wide.high - wide.low)
