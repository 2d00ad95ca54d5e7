"""What each motion representation keeps, what it is blind to, and what it does not mind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.consistency.motion import (
    RADIUS,
    REPRESENTATIONS,
    difference,
    global_correlation,
    high_frequency,
    local_correlation,
    low_frequency,
    low_pass,
)
from raydistill.errors import TooFewFrames

sizes = st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 1000)
few = settings(max_examples=8)


def clip(seed, size=(4, 4, 4), channels=3, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, generator=rng, dtype=dtype)


@few
@given(seeds, sizes)
def test_low_and_high_make_the_whole(seed, size):
    x = clip(seed, size)
    torch.testing.assert_close(low_frequency(x) + high_frequency(x), x)


@few
@given(seeds, sizes)
def test_a_constant_clip_is_all_low(seed, size):
    x = torch.ones_like(clip(0, size)) * clip(seed, (1, 1, 1))
    torch.testing.assert_close(low_frequency(x), x)
    torch.testing.assert_close(high_frequency(x), torch.zeros_like(x))


def test_a_checkerboard_is_all_high():
    sign = (-1.0) ** torch.arange(4, dtype=torch.float64)
    board = (sign[:, None] * sign).expand(1, 2, 4, 4, 4)
    assert low_frequency(board).abs().max() < 1e-3
    torch.testing.assert_close(high_frequency(board), board, rtol=1e-3, atol=1e-3)


@few
@given(seeds, sizes, st.sampled_from([2, 3, 4]), st.integers(-3, 3))
def test_filters_follow_a_clip_that_is_shifted_around(seed, size, dim, by):
    x = clip(seed, size)
    for filtered in (low_frequency, high_frequency):
        torch.testing.assert_close(filtered(x.roll(by, dim)), filtered(x).roll(by, dim))


@few
@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_filters_and_difference_are_linear(seed, a, b):
    x, y = clip(seed), clip(seed + 1)
    for name in ("raw", "difference", "low_frequency", "high_frequency"):
        m = REPRESENTATIONS[name]
        torch.testing.assert_close(m(a * x + b * y), a * m(x) + b * m(y))


@few
@given(seeds, sizes)
def test_the_difference_is_blind_to_what_is_constant_in_time(seed, size):
    x, still = clip(seed, size), clip(seed + 1, (1, *size[1:]))
    torch.testing.assert_close(difference(x + still), difference(x))
    assert difference(still.expand_as(x)).abs().max() == 0


@few
@given(seeds)
def test_correlations_do_not_mind_turned_channels_and_are_quadratic(seed):
    x = clip(seed, (3, 3, 4))
    turn = torch.linalg.qr(clip(seed + 1, (1, 1, 3))[0, :, 0, 0]).Q
    turned = torch.einsum("dc,bcfhw->bdfhw", turn, x)
    for correlation in (local_correlation, global_correlation):
        torch.testing.assert_close(correlation(turned), correlation(x))
        torch.testing.assert_close(correlation(2 * x), 4 * correlation(x))


@few
@given(seeds, st.integers(-3, 3), st.integers(-3, 3))
def test_correlations_peak_at_a_sprites_displacement(seed, down, right):
    """A sprite of one bright pixel in its own channels, moved by (down, right)."""
    sprite = torch.zeros(1, 4, 2, 9, 9)
    sprite[0, :, 0, 4, 4] = sprite[0, :, 1, 4 + down, 4 + right] = clip(seed, (1, 1, 1), 4)[
        0, :, 0, 0, 0
    ].float()
    window = 2 * RADIUS + 1
    near = local_correlation(sprite)
    assert near.shape == (1, 1, 225, 9, 9)
    best = int(near[0, 0, :, 4, 4].argmax())
    assert (best // window - RADIUS, best % window - RADIUS) == (down, right)
    anywhere = int(global_correlation(sprite)[0, 0, 4 * 9 + 4].argmax())
    assert (anywhere // 9 - 4, anywhere % 9 - 4) == (down, right)


@few
@given(seeds, sizes)
def test_the_local_correlation_is_a_window_of_the_global_one(seed, size):
    x = clip(seed, size)
    _, h, w = size
    near, everywhere = local_correlation(x), global_correlation(x).unflatten(3, (h, w)).unflatten(2, (h, w))
    window = 2 * RADIUS + 1
    for d in (0, RADIUS * window + RADIUS, RADIUS * window + RADIUS + 1, (RADIUS - 1) * window + RADIUS):
        down, right = d // window - RADIUS, d % window - RADIUS
        for i in range(h):
            for j in range(w):
                inside = 0 <= i + down < h and 0 <= j + right < w
                expected = everywhere[:, :, i, j, i + down, j + right] if inside else 0 * near[:, :, d, i, j]
                torch.testing.assert_close(near[:, :, d, i, j], expected)


@pytest.mark.parametrize("size", [(4, 4, 4), (16, 4, 6)])
def test_the_mask_is_freeinits(size):
    """Its loop over shifted frequencies, as the formula stands."""
    whole = low_pass(*size)
    centre = [n // 2 for n in size]
    for t in range(size[0]):
        for i in range(size[1]):
            for j in range(size[2]):
                d2 = sum((2 * k / n - 1) ** 2 for k, n in zip((t, i, j), size, strict=True))
                at = tuple((k - c) % n for k, c, n in zip((t, i, j), centre, size, strict=True))
                assert float(whole[at]) == pytest.approx(1 / (1 + (d2 / 0.25**2) ** 4))


def test_the_mask_is_made_once_for_a_size():
    assert low_pass(4, 4, 4) is low_pass(4, 4, 4)


def test_a_mask_first_made_in_inference_mode_serves_training():
    low_pass.cache_clear()
    with torch.inference_mode():
        low_frequency(clip(0))
    x = clip(0).requires_grad_()
    low_frequency(x).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["difference", "local_correlation", "global_correlation"])
def test_what_compares_frames_needs_two(name):
    with pytest.raises(TooFewFrames, match="2 or more"):
        REPRESENTATIONS[name](clip(0, (1, 2, 2)))


@pytest.mark.parametrize("name", sorted(REPRESENTATIONS))
def test_every_representation_widens_half_precision_and_has_a_gradient(name):
    x = clip(0, dtype=torch.float32).bfloat16().requires_grad_()
    seen = REPRESENTATIONS[name](x)
    assert seen.dtype == torch.float32
    seen.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
