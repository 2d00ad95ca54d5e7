"""Shape aliases and the records that travel between stages."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

Latents = Float[Tensor, "b c f h w"]
Times = Float[Tensor, " b"]
Text = Float[Tensor, "b l d"]
Indices = Int[Tensor, " b"]


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch, in the order of the plan."""

    index: Indices
    """Global sample indices: they key every random number."""
    latents: Latents
    """Clean latents x0, normalised as the teacher expects."""
    text: Text
    """Text embedding of each caption."""
