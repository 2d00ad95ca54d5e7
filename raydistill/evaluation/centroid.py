"""The shape's path, read from pixels without a net.

The small world's backgrounds are nearly grey and its shapes strongly coloured: colourfulness (largest minus
smallest channel) finds the shape on plain, striped and shaded backgrounds alike, also when it hardly moves
and a background model would swallow it. White outlines have none, so the coloured inside is what is measured;
its centroid is the shape's centre for squares, circles and equilateral triangles.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

FLOOR = 40.0
"""Colourfulness, 0..255, below which nothing counts as a shape; backgrounds stay under 25."""

Paths = Float[np.ndarray, "n f 2"]


def centroid_path(frames: UInt8[np.ndarray, "n f h w 3"]) -> Paths:
    """Centre of the coloured area in each frame, (x, y) in pixels.

    Pixels count by how far they exceed half the clip's own peak. A frame without a shape gives the frame's
    middle: a shape that vanishes costs jitter instead of being left out.
    """
    colour = frames.max(axis=-1).astype(np.float64) - frames.min(axis=-1)
    peak = np.percentile(colour, 99, axis=(1, 2, 3), keepdims=True)
    mass = np.clip(colour - np.maximum(peak / 2, FLOOR), 0, None)
    total = mass.sum(axis=(2, 3))
    height, width = frames.shape[2:4]
    x = (mass.sum(axis=2) * np.arange(width)).sum(axis=-1)
    y = (mass.sum(axis=3) * np.arange(height)).sum(axis=-1)
    middle = ((width - 1) / 2, (height - 1) / 2)
    seen = total > 0
    safe = np.where(seen, total, 1.0)
    return np.stack([np.where(seen, x / safe, middle[0]), np.where(seen, y / safe, middle[1])], axis=-1)


@dataclass(frozen=True)
class Motion:
    """A straight line through each path."""

    velocity: Float[np.ndarray, "n 2"]
    """Pixels per frame, (right, down)."""
    jitter: Float[np.ndarray, " n"]
    """Root mean square distance of the centroids from the line, px: 0 for the world's own motion."""


def fit_motion(paths: Paths) -> Motion:
    """Least-squares line of constant speed through every path; needs two frames or more."""
    time = np.arange(paths.shape[1]) - (paths.shape[1] - 1) / 2
    centred = paths - paths.mean(axis=1, keepdims=True)
    velocity = np.einsum("f,nfc->nc", time, centred) / np.square(time).sum()
    residual = centred - time[None, :, None] * velocity[:, None]
    return Motion(velocity, np.sqrt(np.square(residual).sum(axis=-1).mean(axis=-1)))
