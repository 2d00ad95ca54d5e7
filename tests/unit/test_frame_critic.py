"""The image critic: what a logit depends on, what it does not, and where gradients go."""

import pytest
import torch
from torch import nn

from raydistill.models.frame_critic import FrameCritic, _SpectralConv, pool_text
from raydistill.models.frame_features import FrameNet
from raydistill.models.text import WordVectors

WIDTHS, TEXT = (8, 12), 6


def critic(seed=0):
    torch.manual_seed(seed)
    return FrameCritic(WIDTHS, TEXT, channels=16)


def maps(n=5):
    rng = torch.Generator().manual_seed(1)
    tokens = [torch.randn(n, k, w, generator=rng) for k, w in zip((16, 9), WIDTHS, strict=True)]
    return tokens, torch.randn(n, TEXT, generator=rng)


def test_a_frames_logits_depend_on_it_alone():
    net, (tokens, text) = critic(), maps()
    whole = net(tokens, text)
    assert [x.shape for x in whole] == [(5, 16), (5, 9)]
    parts = [net([m[i : i + 1] for m in tokens], text[i : i + 1]) for i in range(5)]
    for k in range(2):
        torch.testing.assert_close(whole[k], torch.cat([part[k] for part in parts]))


def test_looking_changes_nothing():
    net, (tokens, text) = critic(), maps()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    first = net(tokens, text)
    assert all(torch.equal(a, b) for a, b in zip(first, net(tokens, text), strict=True))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_weights_have_a_largest_singular_value_of_one():
    for seed in range(3):
        for module in critic(seed).modules():
            if isinstance(module, _SpectralConv):
                with torch.no_grad():
                    module.weight.mul_(7)
                kernel = module.weight.shape[2]
                # The weight in use, read off the convolution of single impulses without bias.
                eye = torch.eye(module.weight.shape[1] * kernel).view(-1, module.weight.shape[1], kernel)
                pad = kernel // 2
                seen = module(eye.roll(0, 2))[:, :, pad] - (0 if module.bias is None else module.bias)
                top = torch.linalg.svdvals(seen).max().item()
                assert 0.99 <= top <= 1.12


def test_the_caption_decides_what_is_asked():
    net, (tokens, text) = critic(), maps()
    assert not torch.allclose(net(tokens, text)[0], net(tokens, text.flip(0))[0])
    silent = net(tokens, torch.zeros_like(text))  # the empty caption has logits too
    assert all(x.abs().max() > 0 for x in silent)


def test_tokens_reach_their_neighbours_around_the_edge():
    net, (tokens, text) = critic(), maps()
    moved = net([m.roll(3, 1) for m in tokens], text)
    for ours, theirs in zip(net(tokens, text), moved, strict=True):
        torch.testing.assert_close(ours.roll(3, 1), theirs)


def test_gradients_reach_tokens_and_every_weight():
    net, (tokens, text) = critic(), maps()
    for m in tokens:
        m.requires_grad_()
    sum(x.square().sum() for x in net(tokens, text)).backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in tokens)
    for name, p in net.named_parameters():
        assert p.grad is not None, name


def test_a_score_reaches_frames_and_heads_through_a_net_that_stays_frozen():
    torch.manual_seed(0)
    eye = FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).eval().requires_grad_(False)
    net, frames = FrameCritic(eye.widths, TEXT, channels=16), torch.rand(2, 3, 32, 32).requires_grad_()
    sum(x.mean() for x in net(eye(frames), torch.randn(2, TEXT))).backward()
    assert frames.grad is not None
    assert frames.grad.flatten(1).abs().sum(dim=1).min() > 0
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in eye.parameters())


def test_it_learns_to_tell_two_kinds_apart():
    net, (tokens, text) = critic(), maps(8)
    other = [m.flip(1) * 2 + 0.5 for m in tokens]
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        real, fake = net(tokens, text), net(other, text)
        loss = sum(
            torch.relu(1 - r).mean() + torch.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)
        )
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.8 * 4  # where it began


def test_captions_are_pooled_over_their_words():
    words = WordVectors(num_tokens=4, width=6)
    text = words(["red square", "blue", ""])
    pooled = pool_text(text)
    torch.testing.assert_close(pooled[0], text[0, :2].mean(dim=0))
    torch.testing.assert_close(pooled[1], text[1, 0])
    assert pooled[2].abs().max() == 0


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_nothing_of_the_batch_is_averaged(kind):
    assert not any(isinstance(module, kind) for module in critic().modules())
