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


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_over_maps(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.flatten(1).mean(dim=1) for value in values]).mean(dim=0)


def pseudo_huber(a: Latents, b: Latents, c: float) -> PerSample:
    """Pseudo-Huber distance, mean of sqrt((a - b)^2 + c^2) - c (iCT, sec. 3.3; DCM's code: c = 1e-3).

    c > 0 is in latent units. Written without the difference of near-equal numbers, which float32 would lose.
    """
    square = (_widen(a) - _widen(b)) ** 2
    return (square / ((square + c * c).sqrt() + c)).flatten(1).mean(dim=1)


def temporal_coherence(guess: Latents, goal: Latents, stride: int) -> PerSample:
    """Temporal coherence loss, L_TC (DCM, eq. 8): squared change of the error over `stride` latent frames.

    Blind to an error that is constant in time. DCM's code uses stride 3 and the mean over elements. Raises
    TooFewFrames unless there are more frames than the stride.
    """
    if guess.shape[2] <= stride:
        raise TooFewFrames(f"temporal coherence at stride {stride} needs more frames than {guess.shape[2]}")
    error = _widen(guess) - _widen(goal)
    return ((error[:, :, stride:] - error[:, :, :-stride]) ** 2).flatten(1).mean(dim=1)


def hinge_critic(real_logits: Maps, fake_logits: Maps) -> PerSample:
    """Loss of the critic, relu(1 - real) + relu(1 + fake), mean over maps (GG, eq. 10; DCM's code)."""
    real = _mean_over_maps(torch.relu(1 - _widen(logits)) for logits in real_logits)
    return real + _mean_over_maps(torch.relu(1 + _widen(logits)) for logits in fake_logits)


def hinge_generator(fake_logits: Maps) -> PerSample:
    """Loss of the generator, relu(1 - fake), mean over maps.

    Hinged as in DCM's code: no gradient once the critic is sure (DCM, eq. 10 writes no margin).
    """
    return _mean_over_maps(torch.relu(1 - _widen(logits)) for logits in fake_logits)


def feature_matching(fake: Maps, real: Maps) -> PerSample:
    """Feature matching loss, L_FM (DCM, sec. 3.3): mean squared difference; `real` gets no gradient."""
    pairs = zip(fake, real, strict=True)
    return _mean_over_maps((_widen(a) - _widen(b).detach()) ** 2 for a, b in pairs)
