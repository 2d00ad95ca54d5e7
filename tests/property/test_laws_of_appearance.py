"""DiffAugment, the image critic's losses and its penalty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.consistency.augment import Augmentation, augment, draw_augmentation
from raydistill.consistency.losses import (
    generator_score,
    gradient_penalty,
    hinge_critic,
    hinge_fake,
    hinge_real,
)

seeds = st.integers(0, 1000)


def frames(seed, n=3, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def numbers(seed, n=3):
    return torch.rand(n, 7, generator=torch.Generator().manual_seed(seed))


def nothing(n=3, **changed):
    """An augmentation that changes nothing but what is given."""
    zero, one = torch.zeros(n), torch.ones(n)
    fields = {"brightness": zero, "saturation": one, "contrast": one, "shift": torch.zeros(n, 2)}
    return Augmentation(**{**fields, "hole": torch.full((n, 2), -1.0), **changed})


def test_nothing_changes_nothing():
    torch.testing.assert_close(augment(frames(0), nothing()), frames(0))


@given(seeds)
def test_numbers_stay_in_the_papers_ranges(seed):
    by = draw_augmentation(numbers(seed, 50))
    assert -0.5 <= by.brightness.min() <= by.brightness.max() < 0.5
    assert 0 <= by.saturation.min() <= by.saturation.max() < 2
    assert 0.5 <= by.contrast.min() <= by.contrast.max() < 1.5
    assert by.shift.abs().max() <= 0.125
    assert 0 <= by.hole.min() <= by.hole.max() < 1


def test_the_ends_of_the_ranges():
    low, high = draw_augmentation(torch.zeros(1, 7)), draw_augmentation(torch.ones(1, 7))
    for name, ends in {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}.items():
        assert (getattr(low, name).item(), getattr(high, name).item()) == ends
    assert (low.shift.tolist(), high.shift.tolist()) == ([[-0.125, -0.125]], [[0.125, 0.125]])
    assert (low.hole.tolist(), high.hole.tolist()) == ([[0, 0]], [[1, 1]])


@given(seeds, seeds)
def test_a_frame_is_changed_by_its_own_numbers_alone(seed, other):
    x, u = frames(seed), numbers(other)
    whole = augment(x, draw_augmentation(u))
    alone = [augment(x[i : i + 1], draw_augmentation(u[i : i + 1])) for i in range(len(x))]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_colours_by_hand():
    x = frames(1)
    brighter = augment(x, nothing(brightness=torch.full((3,), 0.25)))
    torch.testing.assert_close(brighter, x + 0.25)
    grey = augment(x, nothing(saturation=torch.zeros(3)))
    torch.testing.assert_close(grey, x.mean(dim=1, keepdim=True).expand_as(x))
    flat = augment(x, nothing(contrast=torch.full((3,), 0.5)))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, (x + mean) / 2)


@pytest.mark.parametrize(("down", "right"), [(2, 0), (-2, 1), (0, -1)])
def test_frames_are_moved_by_whole_pixels_and_zeros_come_in(down, right):
    x = frames(2)
    moved = augment(x, nothing(shift=torch.tensor([[down / 16, right / 16]]).expand(3, 2)))
    expected = torch.zeros_like(x)
    h = slice(max(0, down), 16 + min(0, down)), slice(max(0, -down), 16 + min(0, -down))
    w = slice(max(0, right), 16 + min(0, right)), slice(max(0, -right), 16 + min(0, -right))
    expected[:, :, h[0], w[0]] = x[:, :, h[1], w[1]]
    torch.testing.assert_close(moved, expected)


def test_a_square_is_blanked():
    x = frames(3, size=20) + 3  # nowhere 0
    seen = augment(x, nothing(hole=torch.full((3, 2), 0.5)))
    assert int((seen == 0).sum()) == 3 * 3 * 4**2  # a fifth of each side
    assert seen[:, :, 8:12, 8:12].abs().max() == 0


@given(seeds)
def test_the_gradient_passes_all_of_it(seed):
    x = frames(seed).requires_grad_()
    augment(x, draw_augmentation(numbers(seed))).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


logits = st.lists(st.floats(-4, 4), min_size=2, max_size=6)


@given(logits, logits)
def test_the_hinge_is_mcms_wgan_flag_and_two(real, fake):
    r, f = torch.tensor([real]), torch.tensor([fake])
    flag = torch.clamp(-r, min=-1).mean() + torch.clamp(f, min=-1).mean()
    torch.testing.assert_close(hinge_critic([r], [f])[0], flag + 2)
    torch.testing.assert_close(hinge_critic([r], [f]), hinge_real([r]) + hinge_fake([f]))


@given(logits, st.floats(-3, 3))
def test_the_generators_score_has_the_same_slope_everywhere(values, by):
    x = torch.tensor([values, values]) + torch.tensor([[0.0], [by]])
    score = generator_score([x, x])
    torch.testing.assert_close(score[0] - score[1], torch.tensor(by), atol=1e-5, rtol=1e-5)


@given(seeds)
def test_the_penalty_of_a_linear_critic_by_hand(seed):
    rng = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, n, 3, generator=rng).requires_grad_() for n in (5, 2)]
    weights = [torch.randn(n, 3, generator=rng).requires_grad_() for n in (5, 2)]
    scores = sum((m * w).sum(dim=(1, 2)) for m, w in zip(maps, weights, strict=True))
    norm = torch.sqrt(sum(w.square().sum() for w in weights))
    penalty = gradient_penalty(scores, maps)
    torch.testing.assert_close(penalty, ((norm - 1) ** 2).expand(4))
    penalty.sum().backward()
    assert all(w.grad is not None for w in weights)
