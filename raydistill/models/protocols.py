"""What the maths is applied to: protocols, no base classes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from raydistill.types import Latents, Text, Times


@runtime_checkable
class VelocityField(Protocol):
    """v(x_t, t, text), the network's prediction; on rectified flow the velocity noise - x0."""

    def __call__(self, x_t: Latents, t: Times, text: Text, /) -> Latents:
        """Predict at times t in [0, 1], one per sample; shape of x_t."""
        ...


class TextEncoder(Protocol):
    """Captions to what a network is conditioned on."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What shapes the embedding, for fingerprints."""
        ...

    def __call__(self, captions: Sequence[str], /) -> Text:
        """Embed captions: float32 (b, l, d) on the CPU; '' is the null text."""
        ...


class VideoCodec(Protocol):
    """Frames to normalised latents and back."""

    def encode(self, frames: Tensor) -> Latents:
        """Frames (b, 3, f, h, w) in [-1, 1] to latents of about unit variance per channel."""
        ...

    def decode(self, latents: Latents) -> Tensor:
        """Latents to frames (b, 3, f, h, w), clipped to [-1, 1]."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Frames of a clip of so many latent frames."""
        ...

    def decode_frames(
        self, latents: Latents, picked: Int[Tensor, "b k"], *, checkpoint: bool = False
    ) -> Tensor:
        """Decode k frames of each clip by number, (b, 3, k, h, w), with gradient and not clipped.

        With `checkpoint`, activations are computed again in the backward pass.
        """
        ...


class FeatureField(VelocityField, Protocol):
    """A velocity field whose hidden maps a critic can look at."""

    def features(
        self, x_t: Latents, t: Times, text: Text, blocks: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden maps after the given blocks, and the same maps through the network's own last layer."""
        ...
