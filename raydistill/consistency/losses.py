"""Terms of the objective, one number per sample; half precision is widened to float32 first."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.errors import TooFewFrames
from raydistill.types import Latents

PerSample = Float[Tensor, " b"]
Maps = Sequence[Float[Tensor, "b ..."]]
"""One tensor per feature map of the critic; each map counts alike, whatever its size."""


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_over_maps(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.flatten(1).mean(dim=1) for value in values]).mean(dim=0)


def pseudo_huber(a: Latents, b: Latents, c: float) -> PerSample:
    """Pseudo-Huber distance, mean of sqrt((a - b)^2 + c^2) - c (iCT, sec. 3.3; DCM's code: c = 1e-3).

    c > 0 is in latent units. Written without the difference of near-equal numbers, which float32 would lose.
    """
    square = (widen(a) - widen(b)) ** 2
    return (square / ((square + c * c).sqrt() + c)).flatten(1).mean(dim=1)


def temporal_coherence(guess: Latents, goal: Latents, stride: int) -> PerSample:
    """Temporal coherence loss, L_TC (DCM, eq. 8): squared change of the error over `stride` latent frames.

    Blind to an error that is constant in time. DCM's code uses stride 3 and the mean over elements. Raises
    TooFewFrames unless there are more frames than the stride.
    """
    if guess.shape[2] <= stride:
        raise TooFewFrames(f"temporal coherence at stride {stride} needs more frames than {guess.shape[2]}")
    error = widen(guess) - widen(goal)
    return ((error[:, :, stride:] - error[:, :, :-stride]) ** 2).flatten(1).mean(dim=1)


def hinge_critic(real_logits: Maps, fake_logits: Maps) -> PerSample:
    """Loss of the critic, relu(1 - real) + relu(1 + fake), mean over maps (GG, eq. 10; DCM's code)."""
    return hinge_real(real_logits) + hinge_fake(fake_logits)


def hinge_real(logits: Maps) -> PerSample:
    """The critic's hinge on real samples, relu(1 - logit), mean over maps (GG, eq. 10; MCM, eq. 5)."""
    return _mean_over_maps(torch.relu(1 - widen(x)) for x in logits)


def hinge_fake(logits: Maps) -> PerSample:
    """The critic's hinge on generated samples, relu(1 + logit), mean over maps.

    MCM's flag "wgan", max(-1, -real) + max(-1, fake), is both hinges less 2.
    """
    return _mean_over_maps(torch.relu(1 + widen(x)) for x in logits)


def generator_score(fake_logits: Maps) -> PerSample:
    """Loss of MCM's generator, -logit, mean over maps (MCM, eq. 4): no margin, a gradient at any score."""
    return _mean_over_maps(-widen(logits) for logits in fake_logits)


def gradient_penalty(scores: PerSample, features: Sequence[Tensor]) -> PerSample:
    """(|d score / d features| - 1)^2 per sample, over all feature maps together (WGAN-GP, eq. 3; MCM's code).

    `features` are leaves that `scores` was computed from; the result has a graph to the critic's weights.
    """
    gradients = torch.autograd.grad(scores.sum(), list(features), create_graph=True)
    square = torch.stack([widen(g).flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
    return (square.clamp(min=1e-24).sqrt() - 1) ** 2


def hinge_generator(fake_logits: Maps) -> PerSample:
    """Loss of the generator, relu(1 - fake), mean over maps.

    Hinged as in DCM's code: no gradient once the critic is sure (DCM, eq. 10 writes no margin).
    """
    return _mean_over_maps(torch.relu(1 - widen(logits)) for logits in fake_logits)


def feature_matching(fake: Maps, real: Maps) -> PerSample:
    """Feature matching loss, L_FM (DCM, sec. 3.3): mean squared difference; `real` gets no gradient."""
    pairs = zip(fake, real, strict=True)
    return _mean_over_maps((widen(a) - widen(b).detach()) ** 2 for a, b in pairs)
