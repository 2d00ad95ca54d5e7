import pytest
import torch

from raydistill.consistency.losses import (
    feature_matching,
    hinge_critic,
    hinge_generator,
    pseudo_huber,
    temporal_coherence,
)
from raydistill.errors import TooFewFrames


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pseudo_huber_by_hand():
    a, b = torch.zeros(2, 1, 2, 1, 1, dtype=torch.float64), torch.zeros(2, 1, 2, 1, 1, dtype=torch.float64)
    a[0, 0, 0], a[1] = 3.0, 4.0
    # per sample, the mean over elements: (sqrt(9 + 16) - 4, 0) and (sqrt(16 + 16) - 4) twice
    torch.testing.assert_close(pseudo_huber(a, b, 4.0), torch.tensor([0.5, 32**0.5 - 4], dtype=torch.float64))


def test_pseudo_huber_keeps_tiny_differences_in_float32():
    a = torch.full((1, 1, 1, 1, 1), 1e-6)
    # sqrt(d^2 + c^2) - c rounds to 0 in float32; the truth is d^2 / 2c
    assert pseudo_huber(a, torch.zeros_like(a), 1e-2).item() == pytest.approx(5e-11, rel=1e-3)


def test_half_precision_is_widened():
    a, b = normal(1, 2, 2, 4, 2, 2).bfloat16(), normal(2, 2, 2, 4, 2, 2).bfloat16()
    assert pseudo_huber(a, b, 1e-3).dtype == torch.float32
    torch.testing.assert_close(pseudo_huber(a, b, 1e-3), pseudo_huber(a.float(), b.float(), 1e-3))


def test_temporal_coherence_by_hand():
    goal = torch.zeros(1, 1, 5, 1, 1, dtype=torch.float64)
    guess = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0], dtype=torch.float64).view(1, 1, 5, 1, 1)
    # e_{t+3} - e_t = (2, 0): mean of squares 2
    assert temporal_coherence(guess, goal, 3).tolist() == [2.0]


def test_temporal_coherence_needs_more_frames_than_its_stride():
    x = normal(1, 1, 2, 3, 2, 2)
    temporal_coherence(x, x, 2)
    with pytest.raises(TooFewFrames, match="more frames than 3"):
        temporal_coherence(x, x, 3)


@pytest.mark.parametrize(
    ("real", "fake", "critic", "generator"), [(-1, -1, 2, 2), (0, 0, 2, 1), (1, 1, 2, 0)]
)
def test_hinge_values(real, fake, critic, generator):
    real, fake = ([torch.full((2, 3), float(value))] for value in (real, fake))
    assert hinge_critic(real, fake).tolist() == [critic, critic]
    assert hinge_generator(fake).tolist() == [generator, generator]


def test_hinge_is_zero_when_the_critic_is_right():
    assert hinge_critic([torch.ones(1, 2)], [-torch.ones(1, 2)]).tolist() == [0.0]


def test_hinged_generator_has_no_gradient_once_it_wins():
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    hinge_generator([logits]).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, -0.5]]


def test_maps_count_alike_whatever_their_size():
    fake = [torch.zeros(1, 100), torch.full((1, 1), -1.0)]
    assert hinge_generator(fake).tolist() == [1.5]
    real = [torch.zeros(1, 5, 3), torch.full((1, 2, 2), 2.0)]
    assert feature_matching([torch.zeros_like(m) for m in real], real).tolist() == [2.0]


def test_feature_matching_sends_no_gradient_to_the_real_side():
    fake, real = normal(1, 2, 3, 4).requires_grad_(), normal(2, 2, 3, 4).requires_grad_()
    feature_matching([fake], [real]).sum().backward()
    assert real.grad is None
    assert fake.grad is not None


def test_feature_matching_wants_as_many_maps_on_both_sides():
    with pytest.raises(ValueError, match="zip"):
        feature_matching([torch.zeros(1, 2)] * 2, [torch.zeros(1, 2)])
