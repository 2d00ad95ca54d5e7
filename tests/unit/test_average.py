import pytest
import torch

from raydistill.consistency.average import moving_average_


def test_one_step_by_hand():
    target, source = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    moving_average_(target, source, 0.75)
    assert target[0].tolist() == [1.5, 1.0]
    assert source[0].tolist() == [3.0, -2.0]


def test_decay_zero_copies_bit_for_bit():
    source = [torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    target = [torch.randn(1000, generator=torch.Generator().manual_seed(1))]
    moving_average_(target, source, 0.0)
    assert torch.equal(target[0], source[0])


def test_parameters_are_updated_in_place_outside_autograd():
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    moving_average_(target.parameters(), source.parameters(), 0.5)
    assert all(p.grad_fn is None and p.requires_grad for p in target.parameters())


def test_half_precision_weights_average_in_the_targets_dtype():
    target, source = [torch.zeros(1)], [torch.ones(1, dtype=torch.bfloat16)]
    for _ in range(3):
        moving_average_(target, source, 0.999)
    assert target[0].item() == pytest.approx(1 - 0.999**3, rel=1e-4)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        moving_average_([torch.zeros(1)], [], 0.5)
