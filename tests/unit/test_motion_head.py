"""MCM's learned representation: sizes, identity at first, frames apart."""

import pytest
import torch

from raydistill.models.motion_head import build_motion_head


@pytest.mark.parametrize(("kind", "count"), [("learned", 708), ("learned_conv", 113_924)])
def test_sizes_at_four_channels(kind, count):
    assert sum(p.numel() for p in build_motion_head(kind, 4, seed=0).parameters()) == count


@pytest.mark.parametrize("kind", ["learned", "learned_conv"])
def test_it_begins_as_the_identity_bit_for_bit_and_learns(kind):
    head, x = build_motion_head(kind, 4, seed=0), torch.randn(2, 4, 3, 4, 4)
    assert torch.equal(head(x), x)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        (head(x) - 1).square().mean().backward()
        optimiser.step()
    assert not torch.equal(head(x), x)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("kind", ["learned", "learned_conv"])
def test_frames_do_not_see_each_other(kind):
    head = build_motion_head(kind, 4, seed=0)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, 3, 4, 4)
    torch.testing.assert_close(head(x)[:, :, 1:2], head(x[:, :, 1:2]))


def test_the_seed_is_the_heads_and_touches_no_other():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    heads = [build_motion_head("learned", 4, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.randn(3), expected)
    first, same, other = (next(iter(head.parameters())) for head in heads)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
