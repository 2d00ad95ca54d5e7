"""Two networks that share the path, as Wan2.2's pipeline has them: a dual expert already."""

import torch
from torch import nn

from raydistill.models.wan import WanField
from raydistill.types import Latents, Text, Times


class PairField(nn.Module):
    """v(x_t, t, text) of the network that owns each sample's time."""

    def __init__(self, high: WanField, low: WanField, ratio: float):
        """`high` has the times at and above `ratio`, in (0, 1), `low` the others (diffusers' WanPipeline)."""
        super().__init__()
        self.high, self.low, self.ratio = high, low, ratio

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Route each sample; the batch may mix both sides in any order."""
        noisy = t.double() >= self.ratio
        if bool(noisy.all()):
            return self.high(x_t, t, text)
        if not bool(noisy.any()):
            return self.low(x_t, t, text)
        velocity = torch.empty_like(x_t)
        for side, field in ((noisy, self.high), (~noisy, self.low)):
            here = side.to(x_t.device)
            velocity[here] = field(x_t[here], t[side], text[here])
        return velocity
