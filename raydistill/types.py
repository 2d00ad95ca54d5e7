"""Shape aliases and the records that travel between stages."""

from dataclasses import dataclass
from enum import IntEnum

from jaxtyping import Float, Int
from torch import Tensor

Latents = Float[Tensor, "b c f h w"]
Times = Float[Tensor, " b"]
Text = Float[Tensor, "b l d"]
Indices = Int[Tensor, " b"]


class Origin(IntEnum):
    """Where the path of a training sample begins (MCM, sec. 3.3: real and simulated trajectories)."""

    VIDEO = 0
    """At a video's latents x0, noised."""
    SIMULATED = 1
    """At the student's own one-step sample x0, noised; of the row only the text is used."""
    RECORDED = 2
    """On a path of the teacher that was recorded ahead: x_t and x_r are read."""


@dataclass(frozen=True)
class Images:
    """Rows of the image lane that go with one micro-batch."""

    index: Indices
    """Indices of the image lane's own count: they key random numbers."""
    latents: Latents
    """Clean latents of single frames, (m, c, 1, h, w)."""
    text: Text
    """Embedding of the images' own captions."""


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch, in the order of the plan."""

    index: Indices
    """Global sample indices: they key every random number."""
    latents: Latents
    """Clean latents x0, normalised as the teacher expects; of a recorded path the state x_t."""
    text: Text
    """Text embedding of each caption."""
    origin: Indices | None = None
    """`Origin` of each sample; None: all are videos."""
    x_r: Latents | None = None
    """Of a recorded path the state one teacher step below x_t, else zeros; None where no path is recorded."""
    images: Images | None = None
    """None where the run has no image lane."""
