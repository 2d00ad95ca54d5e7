"""Frechet distance on frozen random features: a set-level distance that needs no downloaded weights.

A small 3-D convolution net with fixed random weights; half of its first kernels see only change over time.
Gaussian fits in float64, distance as in FID and FVD (Heusel et al., arXiv 1706.08500, eq. 6). It is *not
comparable with FVD*: other features, another scale. It is comparable between samplers on the same reference
clips and the same number of clips, and is biased upwards at small numbers: always read it beside its null,
real clips at the same number.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raydistill import draws
from raydistill.evaluation.intervals import Bootstrapped

VERSION = 1
WIDTH = 64
_LAYERS = ((3, 32, (5, 5, 5)), (32, WIDTH, (3, 3, 3)))  # channels in and out, kernel (f, h, w); stride 2

Frames = UInt8[np.ndarray, "n f h w 3"]
Features = Float[np.ndarray, "n d"]


def _kernels() -> list[Tensor]:
    kernels = []
    for number, (into, out, size) in enumerate(_LAYERS):
        w = draws.noise(VERSION, torch.arange(out), f"evaluation/features/{number}", (into, *size)).double()
        if number == 0:
            w = w - w.mean(dim=(2, 3, 4), keepdim=True)  # blind to flat colour, which says nothing of quality
            still = w[: out // 2].mean(dim=2, keepdim=True)
            w[: out // 2] -= still
        kernels.append((w * (2 / w.square().sum(dim=(1, 2, 3, 4), keepdim=True)).sqrt()).float())
    return kernels


class RandomFeatures:
    """Clips to 64 numbers each, by a net nobody trained."""

    def __init__(self, batch_size: int = 32):
        """Draw the weights: the same on every machine."""
        self.kernels = _kernels()
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, frames: Frames) -> Features:
        """Mean activations of uint8 clips, float64."""
        out = []
        for start in range(0, len(frames), self.batch_size):
            x = (
                torch.from_numpy(frames[start : start + self.batch_size]).permute(0, 4, 1, 2, 3).float()
                / 127.5
                - 1
            )
            for w in self.kernels:
                x = torch.nn.functional.conv3d(x, w, stride=2, padding=[k // 2 for k in w.shape[2:]]).relu()
            out.append(x.mean(dim=(2, 3, 4)))
        return torch.cat(out).double().numpy()


@dataclass(frozen=True)
class Moments:
    """A Gaussian fit."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Features, weights: Float[np.ndarray, " n"] | None = None) -> Moments:
    """Fit a Gaussian, weighting clips if asked (weights sum to 1)."""
    n = len(features)
    w = np.full(n, 1 / n) if weights is None else weights
    center = w @ features
    return Moments(center, ((features * w[:, None]).T @ features - np.outer(center, center)) * n / (n - 1))


def _root(symmetric: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), symmetric, at least 0."""
    return _apart(a, _root(a.covariance), b)


def _apart(a: Moments, root: Float[np.ndarray, "d d"], b: Moments) -> float:
    """`frechet`, with the root of a's covariance."""
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    apart = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(apart), 0.0)


class FrechetDistance:
    """Distance of a sampler's clips to reference clips, in the reference's own deviations."""

    def __init__(self, reference: Features):
        """Standardise each feature by the reference, so that no single one rules the sum."""
        self.scale = 1 / np.maximum(reference.std(axis=0), 1e-9)
        self.reference = moments(reference * self.scale)
        self.root = _root(self.reference.covariance)

    def __call__(self, features: Features) -> float:
        """Plain distance, biased upwards at few clips."""
        return _apart(self.reference, self.root, moments(features * self.scale))

    def bootstrapped(self, features: Features, weights: Float[np.ndarray, "draws n"]) -> Bootstrapped:
        """Distance with its spread over clips; the reference is taken as given.

        A resampled set has fewer distinct clips and so lies farther away; the draws are moved back onto the
        distance.
        """
        scaled = features * self.scale
        drawn = np.array([_apart(self.reference, self.root, moments(scaled, w)) for w in weights])
        value = self(features)
        return Bootstrapped(value, np.maximum(drawn - drawn.mean() + value, 0.0), len(features))
