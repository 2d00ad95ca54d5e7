"""MCM's discriminator of frames: heads on a frozen net's feature maps, asked about a caption (MCM, 3.2).

The heads have the form of StyleGAN-T's (Sauer et al., 2023), as MCM's do, with two differences, so that what
a batch gives does not depend on how it is split over micro-batches and workers: statistics are of each frame
alone, not of groups of the batch; and the spectral norm keeps no running vectors.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from raydistill.types import Text

POWER_ROUNDS = 12
"""Rounds of power iteration from a fixed start. The norm found may be a few percent too small."""


class _SpectralConv(nn.Module):
    """Convolution over tokens, wrapping around; its weight has largest singular value 1 (Miyato, 2018)."""

    def __init__(self, channels: int, width: int, kernel: int, *, bias: bool):
        super().__init__()
        plain = nn.Conv1d(channels, width, kernel, bias=bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.start: Tensor
        self.register_buffer("start", F.normalize(torch.randn(width), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        flat, size = self.weight.flatten(1), self.weight.shape[2] // 2
        with torch.no_grad():
            u = v = self.start.to(flat)
            for _ in range(POWER_ROUNDS):
                v = F.normalize(flat.T @ u, dim=0)
                u = F.normalize(flat @ v, dim=0)
        if size:
            x = F.pad(x, (size, size), mode="circular")
        return F.conv1d(x, self.weight / (u @ flat @ v), self.bias)


class _Block(nn.Module):
    """Convolution, norm over a frame, leaky ReLU."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = _SpectralConv(width, width, kernel, bias=True)
        # Over channels and tokens at once: a channel's own mean, which norms by channel take away, says most
        # of how a frame looks.
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class _Head(nn.Module):
    """On one feature map."""

    def __init__(self, width: int, text_width: int, channels: int, kernel: int):
        super().__init__()
        self.first, self.second = _Block(width, 1), _Block(width, kernel)
        self.last = _SpectralConv(width, channels, 1, bias=True)
        self.text = nn.Linear(text_width, channels)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        x = self.first(tokens.transpose(1, 2))
        x = (x + self.second(x)) / math.sqrt(2)
        seen, asked = self.last(x), self.text(text)
        return (seen * asked[:, :, None]).sum(dim=1) / math.sqrt(seen.shape[1])


class FrameCritic(nn.Module):
    """One head per feature map; a logit for every token."""

    def __init__(self, widths: Sequence[int], text_width: int, channels: int = 64, kernel: int = 9):
        """Heads for maps of these widths; tokens and captions are compared in `channels` dimensions."""
        super().__init__()
        self.heads = nn.ModuleList(_Head(width, text_width, channels, kernel) for width in widths)

    def forward(self, maps: Sequence[Tensor], text: Float[Tensor, "n d"]) -> list[Float[Tensor, "n tokens"]]:
        """Logits per map, from maps (n, tokens, width) and each frame's pooled caption."""
        return [head(tokens, text) for head, tokens in zip(self.heads, maps, strict=True)]


def pool_text(text: Text) -> Float[Tensor, "b d"]:
    """Mean over a caption's tokens, those that are all zero left out; zeros for the empty caption."""
    there = (text != 0).any(dim=2, keepdim=True).to(text)
    return (text * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
