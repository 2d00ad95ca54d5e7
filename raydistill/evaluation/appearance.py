"""How frames look, beside clean ones: a station's sign, sharpness by frequency, colour, black clips.

Every function takes uint8 clips (n, f, h, w, 3) and returns one number per clip.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from raydistill.evaluation.measures import NEAR_BLACK

Frames = UInt8[np.ndarray, "n f h w 3"]
PerClip = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Sign:
    """A watermark that poor videos carry, always in the same place."""

    glyph: Bool[np.ndarray, "rows columns"]
    rows: slice
    columns: slice
    opacity: float
    """In the poorest videos; (0, 1]."""


def watermark(frames: Frames, sign: Sign) -> PerClip:
    """Opacity of the sign over that in the poorest videos, 0 where it is not seen.

    White at opacity a lifts a pixel of brightness x to x + a (1 - x): a is read off the glyph's pixels
    against those around it in the same box, averaged over frames.
    """
    box = frames[:, :, sign.rows, sign.columns].astype(np.float64).mean(axis=(1, 4)) / 255
    on, around = box[:, sign.glyph].mean(axis=1), box[:, ~sign.glyph].mean(axis=1)
    return np.maximum((on - around) / np.maximum(1 - around, 1e-3), 0) / sign.opacity


def log_spectrum(frames: Frames) -> Float[np.ndarray, "n radii"]:
    """Log power by cycles per pixel, averaged over frames, colours and directions; the mean is left out.

    In as many rings as half of the shorter side has pixels, up to half a cycle.
    """
    x = frames.astype(np.float32) / 255
    h, w = x.shape[2:4]
    power = np.abs(np.fft.fft2(x, axes=(2, 3))).astype(np.float64) ** 2 / (h * w)
    power = power.mean(axis=(1, 4)).reshape(len(x), -1)
    along = [np.fft.fftfreq(size) * min(h, w) for size in (h, w)]
    radius = np.rint(np.hypot(along[0][:, None], along[1][None])).astype(int).ravel()
    last = min(h, w) // 2
    rings = np.stack([power[:, radius == k].mean(axis=1) for k in range(1, last + 1)], axis=1)
    return np.log10(rings + 1e-6)


def spectral_distance(frames: Frames, real: Float[np.ndarray, " radii"]) -> PerClip:
    """Root mean square difference of a clip's log spectrum from the real clips' mean one, in decades.

    Real clips differ among themselves too, so that they do not score 0.
    """
    return np.sqrt(np.square(log_spectrum(frames) - real).mean(axis=1))


def saturation(frames: Frames) -> PerClip:
    """Mean distance of a pixel's brightest colour from its darkest, 0 to 1."""
    return (frames.max(axis=4).astype(np.float64) - frames.min(axis=4)).mean(axis=(1, 2, 3)) / 255


def black_clip(frames: Frames) -> PerClip:
    """1 where every frame is nearly black."""
    return (frames.mean(axis=(2, 3, 4)) < NEAR_BLACK).all(axis=1).astype(np.float64)
