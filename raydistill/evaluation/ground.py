"""What samplers are measured on: the small world, or prepared clips of a real teacher's user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from raydistill.evaluation.records import Record
from raydistill.types import Text

Frames = UInt8[np.ndarray, "n f h w 3"]
NumpyLatents = Float[np.ndarray, "n c f h w"]
Features = Float[np.ndarray, "n d"]
Values = dict[str, Float[np.ndarray, " n"]]
"""Measure -> figure per clip."""


class Ground(Protocol):
    """What is the same for every sampler: captions, real clips, and how samples are measured."""

    @property
    def captions(self) -> tuple[str, ...]:
        """One per clip."""
        ...

    @property
    def text(self) -> Text:
        """Embedded captions."""
        ...

    @property
    def seed(self) -> int:
        """Keys the noise, with the clip's number."""
        ...

    @property
    def batch_size(self) -> int:
        """Clips sampled at once."""
        ...

    @property
    def device(self) -> str:
        """Where networks compute."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """All else that shapes a record, for fingerprints."""
        ...

    @property
    def notes(self) -> Mapping[str, Any]:
        """Settings that go into results.json, some of which the report's words hang on."""
        ...

    @property
    def num_reference(self) -> int:
        """Real clips that distances are taken to."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Latents of one clip (c, f, h, w)."""
        ...

    @property
    def meter(self) -> "Meter":
        """Measures clips."""
        ...

    def decode(self, latents: NumpyLatents) -> Frames:
        """Latents to clips."""
        ...

    def real_latents(self, indices: Sequence[int]) -> NumpyLatents:
        """Latents of real clips, clip i of caption i."""
        ...

    def real_frames(self, count: int) -> tuple[str, Frames]:
        """Label and frames of the first so many real clips, to show."""
        ...


class Meter(Protocol):
    """Figures of clips."""

    @property
    def distance(self) -> str | None:
        """Measure that is a distance between sets of features; None: there is none."""
        ...

    @property
    def real_features(self) -> Features:
        """Of the real clips that the distance is taken to."""
        ...

    def measure(self, latents: NumpyLatents, anchor: "Anchor | None") -> tuple[Features, Values]:
        """Features and figures of samples; `anchor`: the teacher's from the same noise, if not these."""
        ...

    def references(self, anchor: "Anchor | None") -> dict[str, Record]:
        """Real clips measured as if they were samples, by label; the first gives the null."""
        ...


@dataclass
class Anchor:
    """The teacher's clips that others from the same noise are compared with."""

    latents: NumpyLatents
    identity: Mapping[str, Any]
    ground: Ground

    @cached_property
    def frames(self) -> Frames:
        """Decoded when the first sampler needs them."""
        return self.ground.decode(self.latents)
