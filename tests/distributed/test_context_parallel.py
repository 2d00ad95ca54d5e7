"""What diffusers' context parallelism does to a clip that two ranks share: the facts behind README's words.

Nothing uses it yet. Each rank computes its part of the tokens, and the whole loss on the gathered output.
"""

import pipeline_cases
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from gloo_ranks import run_ranks

from raydistill.models.wan import WanField

pytestmark = pytest.mark.distributed


def net():
    return WanField(pipeline_cases.stirred(pipeline_cases.wan_transformer()))


def inputs():
    rng = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, 16, 3, 4, 8, generator=rng) for _ in range(2))
    return x.requires_grad_(), torch.tensor([0.3, 0.9]), torch.randn(2, 20, 16, generator=rng), weight


def split(field, **how):
    """Let the ranks share a clip. diffusers asks for a device's number, which a CPU has not."""
    torch.accelerator.device_count = lambda: 2
    field.transformer.enable_parallelism(config=ContextParallelConfig(**how))
    return field


def gradients(field):
    """Of the input and of all weights."""
    x, t, text, weight = inputs()
    out = field(x, t, text)
    (out * weight).sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in field.parameters())]


def trained_alone_and_shared():
    whole, alone = gradients(net())
    out, mine = gradients(split(net(), ulysses_degree=2))
    own = [torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(mine, alone, strict=True)]
    for gradient in mine:
        dist.all_reduce(gradient)
    both = [torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(mine, alone, strict=True)]
    return torch.allclose(out, whole, rtol=1e-4, atol=1e-5), own.count(True), both


def test_gradients_of_two_ranks_add_up_to_those_of_one():
    """The input's, too: their sum is right, not their mean, and no rank's own."""
    for same, own, both in run_ranks(trained_alone_and_shared, 2):
        assert same
        assert all(both)
        assert own < len(both) / 2


def seen_by_a_critic():
    x, t, text, _ = inputs()
    (whole,), (projected,) = net().features(x, t, text, [0])
    (mine,), (gathered,) = split(net(), ulysses_degree=2).features(x, t, text, [0])
    return whole.shape[1], mine.shape[1], torch.allclose(gathered, projected, rtol=1e-4, atol=1e-5)


def test_a_critic_would_see_half_of_the_tokens():
    """Hidden maps are not gathered, projections to latents are: they go through the network's last layer."""
    assert run_ranks(seen_by_a_critic, 2) == [(24, 12, True)] * 2


def test_only_wan_has_a_plan_and_cogvideox_no_dispatch():
    assert pipeline_cases.wan_transformer()._cp_plan is not None
    assert pipeline_cases.hunyuan_transformer()._cp_plan is None
    assert pipeline_cases.cogvideox_transformer()._cp_plan is None
