"""MCM's learned motion representation: a small residual head on every frame, left out after training."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from raydistill.types import Latents

WIDTH = 64
GROUPS = 32
Kind = Literal["learned", "learned_conv"]


class MotionHead(nn.Module):
    """x + h(x) frame by frame; h ends in zeros, so at first it is the identity (MCM, sec. 3.2; its code)."""

    def __init__(self, channels: int, kernel: int = 1, hidden: int = 1):
        """Put `hidden` convolutions of width 64 before the last one, which is 1x1; kernel 1 or 3."""
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for _ in range(hidden):
            layers += [nn.SiLU(), nn.Conv2d(width, WIDTH, kernel, padding=kernel // 2)]
            layers += [nn.GroupNorm(GROUPS, WIDTH)]
            width = WIDTH
        last = nn.Conv2d(width, channels, 1)
        for weight in last.parameters():
            nn.init.zeros_(weight)
        self.layers = nn.Sequential(*layers, nn.SiLU(), last)

    def forward(self, x: Latents) -> Latents:
        """Same shape; frames do not see each other."""
        y: Tensor = self.layers(rearrange(x, "b c f h w -> (b f) c h w"))
        return x + rearrange(y, "(b f) c h w -> b c f h w", b=len(x))


def build_motion_head(kind: Kind, channels: int, seed: int) -> MotionHead:
    """`learned`: two 1x1 layers, 708 parameters at 4 channels; `learned_conv`: 3x3, 113,924."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MotionHead(channels) if kind == "learned" else MotionHead(channels, kernel=3, hidden=4)
