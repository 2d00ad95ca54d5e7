"""DCM's discriminator: small heads on the frozen teacher's hidden maps (DCM, sec. 3.3 and its code)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class _Head(nn.Module):
    """Point-wise network on one hidden map: every token is judged by itself."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        groups = min(32, channels // 2)
        self.enter, self.enter_norm = nn.Conv2d(dim, channels, 1), nn.GroupNorm(groups, channels)
        self.middle, self.middle_norm = nn.Conv2d(channels, channels, 1), nn.GroupNorm(groups, channels)
        self.leave = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.enter_norm(self.enter(x)), 0.2)
        x = x + F.leaky_relu(self.middle_norm(self.middle(x)), 0.2)
        return self.leave(x)


class TokenCritic(nn.Module):
    """One head per hidden map; a logit for every token, averaged by the loss."""

    def __init__(self, num_maps: int, dim: int, channels: int):
        """Heads of width `channels` (DCM: 1024, an even number) for `num_maps` maps of width `dim`."""
        super().__init__()
        self.heads = nn.ModuleList(_Head(dim, channels) for _ in range(num_maps))

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int, int]) -> list[Tensor]:
        """Logits (b, tokens) per map from hidden maps (b, tokens, dim) on a grid (frames, height, width).

        The grid is passed, never assumed: any resolution and length. Frames are judged apart, as in DCM's
        code.
        """
        f, h, w = grid
        logits = []
        for head, tokens in zip(self.heads, maps, strict=True):
            b, _, dim = tokens.shape
            x = tokens.reshape(b * f, h, w, dim).permute(0, 3, 1, 2)
            logits.append(head(x).reshape(b, -1))
        return logits
