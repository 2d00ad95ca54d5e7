"""How much clips move, and how steadily, from pixels alone: nothing is known of what they show.

Every function takes uint8 clips (n, f, h, w, 3) and returns one number per clip.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float, UInt8

from raydistill.errors import TooFewFrames

Frames = UInt8[np.ndarray, "n f h w 3"]
PerClip = Float[np.ndarray, " n"]


def motion(frames: Frames) -> PerClip:
    """Mean absolute difference of neighbouring frames, in 0..1; 0 for a still clip.

    Raises TooFewFrames under two.
    """
    _require(frames, 2, "motion")
    return np.mean([_size(step) for step in _steps(frames)], axis=0) / 255


def flicker(frames: Frames) -> PerClip:
    """Mean absolute change of the change from frame to frame, over that of the change itself.

    0 where brightness runs on evenly, and for a still clip; the square root of 3 for frames of independent
    normal noise; 2 where two pictures take turns. Raises TooFewFrames under three.
    """
    _require(frames, 3, "flicker")
    turns = np.mean([_size(b - a) for a, b in pairwise(_steps(frames))], axis=0)
    size = np.mean([_size(step) for step in _steps(frames)], axis=0)
    return np.divide(turns, size, out=np.zeros(len(frames)), where=size > 0)


def _steps(frames: Frames) -> Iterator[np.ndarray]:
    """Each frame less the one before it; one at a time, as real clips are large."""
    return (b.astype(np.int16) - a for a, b in pairwise(frames.swapaxes(0, 1)))


def _size(step: np.ndarray) -> PerClip:
    return np.abs(step).mean(axis=(1, 2, 3), dtype=np.float64)


def _require(frames: Frames, count: int, what: str) -> None:
    if frames.shape[1] < count:
        raise TooFewFrames(f"{what} wants clips of {count} frames or more, these have {frames.shape[1]}")
