"""DiffAugment: differentiable changes to frames before a critic sees them, real and generated alike.

Nothing is drawn here: an `Augmentation` is a function of uniform numbers, which the caller keys by sample.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Frames = Float[Tensor, "n c h w"]
PerFrame = Float[Tensor, " n"]

TRANSLATION = 1 / 8
"""Largest shift, as a share of height and width."""
CUTOUT = 0.2
"""Side of the square that is blanked, as a share of height and width."""


@dataclass(frozen=True)
class Augmentation:
    """One frame's numbers each."""

    brightness: PerFrame
    """Added, [-0.5, 0.5)."""
    saturation: PerFrame
    """Factor about the mean over channels, [0, 2)."""
    contrast: PerFrame
    """Factor about the mean of the frame, [0.5, 1.5)."""
    shift: Float[Tensor, "n 2"]
    """Down and to the right, as shares of height and width, within TRANSLATION."""
    hole: Float[Tensor, "n 2"]
    """Centre of the blanked square, as shares of height and width, [0, 1)."""


def draw_augmentation(u: Float[Tensor, "n 7"]) -> Augmentation:
    """Numbers in DiffAugment's ranges from uniform ones in [0, 1)."""
    return Augmentation(
        brightness=u[:, 0] - 0.5,
        saturation=2 * u[:, 1],
        contrast=0.5 + u[:, 2],
        shift=TRANSLATION * (2 * u[:, 3:5] - 1),
        hole=u[:, 5:7],
    )


def augment(frames: Frames, by: Augmentation) -> Frames:
    """Colour, then translation with zeros moving in, then cut-out (DiffAugment; MCM's order).

    Frames are in [-1, 1], not clipped. Shifts are of whole pixels; the gradient passes all three.
    """
    brightness, saturation, contrast = (
        x.view(-1, 1, 1, 1).to(frames) for x in (by.brightness, by.saturation, by.contrast)
    )
    x = frames + brightness
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    return _cut_out(_moved(x, by.shift), by.hole)


def _moved(frames: Frames, shift: Float[Tensor, "n 2"]) -> Frames:
    """Translate by whole pixels."""
    n, _, h, w = frames.shape
    size = torch.tensor([h, w], device=frames.device)
    by = (shift.to(frames.device) * size).round().long()
    padded = F.pad(frames, (1, 1, 1, 1))
    # Index 0 and h + 1 are the border of zeros.
    rows = (torch.arange(h, device=frames.device) - by[:, :1] + 1).clamp(0, h + 1)
    columns = (torch.arange(w, device=frames.device) - by[:, 1:] + 1).clamp(0, w + 1)
    which = torch.arange(n, device=frames.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut_out(frames: Frames, hole: Float[Tensor, "n 2"]) -> Frames:
    """Blank a square; at the border it may be partly outside."""
    h, w = frames.shape[2:]
    hole = hole.to(frames)
    inside = [
        ((torch.arange(size, device=frames.device) + 0.5) / size - hole[:, k : k + 1]).abs() < CUTOUT / 2
        for k, size in enumerate((h, w))
    ]
    blank = (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)
    return frames.masked_fill(blank, 0.0)
