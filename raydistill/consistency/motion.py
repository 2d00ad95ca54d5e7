"""What of a video is its motion: representations that a distance can be taken in (MCM, sec. 3.2, table 5).

Each is a pure function of latents (b, c, f, h, w); half precision is widened to float32 first.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from raydistill.consistency.losses import widen
from raydistill.errors import TooFewFrames
from raydistill.types import Latents

CUTOFF = 0.25
"""Of the low-pass, in time and space, as a share of the highest frequency (FreeInit; MCM's code)."""
ORDER = 4
"""Of the Butterworth filter."""
RADIUS = 7
"""Largest displacement in the local correlation, in latent pixels (MCM's code, after GMFlow)."""

# torch leaves these two without annotations.
_fft = cast(Callable[..., Tensor], torch.fft.fftn)  # pyright: ignore[reportUnknownMemberType]
_inverse_fft = cast(Callable[..., Tensor], torch.fft.ifftn)  # pyright: ignore[reportUnknownMemberType]

Volume = Float[Tensor, "b pairs d h w"]


def raw(x: Latents) -> Latents:
    """Everything: the plain consistency distance."""
    return widen(x)


def difference(x: Latents) -> Float[Tensor, "b c pairs h w"]:
    """Change from frame to frame, (b, c, f - 1, h, w): linear, and blind to what is constant in time.

    Raises TooFewFrames for a single frame.
    """
    _require_frames(x, "the difference")
    x = widen(x)
    return x[:, :, 1:] - x[:, :, :-1]


def low_frequency(x: Latents) -> Latents:
    """What is slow in time and smooth in space (FreeInit's Butterworth low-pass): linear.

    Shifting a clip around in time or space shifts the result alike; a constant clip stays as it is.
    """
    x = widen(x)
    dims = (-3, -2, -1)
    kept = _fft(x, dim=dims) * low_pass(x.shape[2], x.shape[3], x.shape[4]).to(x)
    return torch.view_as_real(_inverse_fft(kept, dim=dims))[..., 0]


def high_frequency(x: Latents) -> Latents:
    """What the low-pass leaves out: low + high = raw."""
    return widen(x) - low_frequency(x)


def local_correlation(x: Latents) -> Volume:
    """<x_f(p), x_(f+1)(p + q)> / sqrt(c) for displacements q up to RADIUS, (b, f - 1, 225, h, w) (GMFlow).

    Displacement number (q_y + RADIUS) * (2 RADIUS + 1) + q_x + RADIUS; where p + q is outside the frame it is
    0. Quadratic in the latents, and the same if all frames' channels are turned by one orthogonal matrix.
    Raises TooFewFrames for a single frame.
    """
    _require_frames(x, "a correlation")
    x = widen(x)
    here, there = x[:, :, :-1] / math.sqrt(x.shape[1]), x[:, :, 1:]
    h, w = x.shape[3:]
    there = F.pad(there, (RADIUS, RADIUS, RADIUS, RADIUS))
    window = range(2 * RADIUS + 1)
    # A displacement that no pixel can take is 0 everywhere: small frames need not multiply for it.
    zero = here.new_zeros(here.shape[0], *here.shape[2:])
    moved = [
        (here * there[..., i : i + h, j : j + w]).sum(dim=1)
        if abs(i - RADIUS) < h and abs(j - RADIUS) < w
        else zero
        for i in window
        for j in window
    ]
    return torch.stack(moved, dim=2)


def global_correlation(x: Latents) -> Float[Tensor, "b pairs hw hw"]:
    """<x_f(p), x_(f+1)(q)> / sqrt(c) for all pairs of places, (b, f - 1, h w, h w) (GMFlow).

    Quadratic in the latents, and the same if all frames' channels are turned by one orthogonal matrix.
    Raises TooFewFrames for a single frame.
    """
    _require_frames(x, "a correlation")
    x = widen(x).flatten(3).transpose(1, 2)
    return x[:, :-1].transpose(2, 3) @ x[:, 1:] / math.sqrt(x.shape[2])


REPRESENTATIONS: dict[str, Callable[[Latents], Tensor]] = {
    "raw": raw,
    "difference": difference,
    "low_frequency": low_frequency,
    "high_frequency": high_frequency,
    "local_correlation": local_correlation,
    "global_correlation": global_correlation,
}
"""By the names that settings use; the learned ones are networks, see `raydistill.models.motion_head`."""


@lru_cache(maxsize=16)
def low_pass(frames: int, height: int, width: int) -> Float[Tensor, "f h w"]:
    """Butterworth low-pass over unshifted frequencies, 1 / (1 + (d / CUTOFF)^(2 ORDER)), float64.

    d^2 is the sum of squares of the frequencies in time and space, each over its Nyquist frequency. For even
    sizes FreeInit's loop and fftshift put the same numbers in the same places; for odd ones its centre is off
    by half a frequency, and the filtered clip would not be real: here it is centred.
    """
    # Kept for later calls, which may train though the first one sampled: an inference tensor could not.
    with torch.inference_mode(mode=False):
        t, y, x = (_frequencies(size) for size in (frames, height, width))
        square = t[:, None, None] ** 2 + y[:, None] ** 2 + x**2
        return 1 / (1 + (square / CUTOFF**2) ** ORDER)


def _frequencies(size: int) -> Tensor:
    """In the order of the transform, over Nyquist's: 0 upwards, then the negative ones."""
    k = torch.arange(size, dtype=torch.float64)
    return 2 * torch.where(k < size / 2, k, k - size) / size


def _require_frames(x: Latents, what: str) -> None:
    if x.shape[2] < 2:
        raise TooFewFrames(f"{what} needs 2 or more latent frames, not {x.shape[2]}")
