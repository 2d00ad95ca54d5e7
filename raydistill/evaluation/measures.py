"""Figures of each clip on its own: whether it shows what was asked, how it moves, how it looks.

Every function takes uint8 clips (n, f, h, w, 3) and returns one number per clip, so that intervals, pairs and
averages over training seeds are made in one place (`intervals`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from raydistill.errors import TooFewFrames
from raydistill.evaluation.centroid import centroid_path, fit_motion

VERSION = 1
NEAR_BLACK = 16
"""Mean brightness, 0..255, under which a frame counts as black."""

Frames = UInt8[np.ndarray, "n f h w 3"]
PerClip = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Measure:
    """How to print and judge a figure."""

    name: str
    label: str
    better: str
    """"higher", "lower", or "one" (nearest to 1)."""
    scale: float = 1.0
    """What the figure is multiplied by in print; 100 makes percent of a share."""
    digits: int = 2
    meaning: str = ""
    least: float = 0.0
    """Smallest possible figure."""

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest possible figure: the largest of shares is 1."""
        return self.least, 1.0 if self.scale == 100 else float("inf")


ALL_RIGHT = "right/all"
MEASURES = (
    Measure(
        "frechet",
        "Frechet",
        "lower",
        1,
        1,
        "distance to real clips on random features; not comparable with FVD",
    ),
    Measure(
        ALL_RIGHT,
        "all right %",
        "higher",
        100,
        1,
        "share of clips whose every attribute the judge reads as asked",
    ),
    Measure("right/shape", "shape %", "higher", 100, 1, "share with the shape asked for"),
    Measure("right/colour", "colour %", "higher", 100, 1, "share with the colour asked for"),
    Measure(
        "right/direction", "direction %", "higher", 100, 1, "share with the direction asked for, by the judge"
    ),
    Measure("right/background", "background %", "higher", 100, 1, "share with the background asked for"),
    Measure("right/speed", "speed %", "higher", 100, 1, "share with the speed asked for, by the judge"),
    Measure(
        "path/direction",
        "path right %",
        "higher",
        100,
        1,
        "share whose centroid moves within 45 degrees of it",
    ),
    Measure(
        "path/speed_error",
        "speed err. px",
        "lower",
        1,
        3,
        "px per frame outside the caption's range of speeds",
    ),
    Measure("path/jitter", "jitter px", "lower", 1, 2, "distance of the centroid from a straight path"),
    Measure(
        "features/frechet",
        "Frechet",
        "lower",
        1,
        1,
        "distance to real clips on the features of the network named; larger at fewer clips",
    ),
    Measure(
        "clip/text",
        "CLIP",
        "higher",
        1,
        3,
        "cosine of a CLIP's frames and caption, mean of frames of a clip",
        least=-1.0,
    ),
    Measure("sharpness", "sharpness", "one", 1, 2, "gradient energy over that of real clips"),
    Measure(
        "motion", "motion", "one", 1, 2, "mean difference of neighbouring frames over that of real clips"
    ),
    Measure(
        "flicker",
        "flicker",
        "lower",
        1,
        2,
        "change of the change from frame to frame over the change itself, 0 to 2",
    ),
    Measure("near_black", "black %", "lower", 100, 1, "share of frames that are nearly black"),
    Measure(
        "black_clip", "black clips %", "lower", 100, 1, "share of clips that are nearly black throughout"
    ),
    Measure(
        "watermark",
        "watermark",
        "lower",
        1,
        2,
        "opacity of the station's sign, over that in the poorest field videos",
    ),
    Measure(
        "spectrum",
        "spectrum",
        "lower",
        1,
        2,
        "decades between the power spectrum of the frames and that of real clips",
    ),
    Measure("vividness", "vividness", "one", 1, 2, "saturation of colours over that of real clips"),
    Measure(
        "diversity",
        "diversity",
        "one",
        1,
        2,
        "feature distance between clips of one caption, over real clips'",
    ),
    Measure(
        "teacher/psnr", "PSNR dB", "higher", 1, 1, "pixels against the teacher's clip from the same noise"
    ),
    Measure(
        "teacher/latent_rmse",
        "latent RMSE",
        "lower",
        1,
        3,
        "latents against the teacher's from the same noise",
    ),
    Measure("teacher/motion", "motion / teacher's", "one", 1, 2, "motion over that of the teacher's clips"),
)


BY_NAME = {measure.name: measure for measure in MEASURES}


@dataclass(frozen=True)
class Asked:
    """What each clip should show; entry i of everything belongs to clip i."""

    captions: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    """Attribute -> value per clip, in the judge's words."""
    heading: Float[np.ndarray, "n 2"]
    """Unit vector of the motion, (right, down)."""
    speed: Float[np.ndarray, "n 2"]
    """Lowest and highest px per frame that the caption's word allows."""


def attributes_right(
    logits: Mapping[str, Float[np.ndarray, "n values"]], values: Mapping[str, Sequence[str]], asked: Asked
) -> dict[str, PerClip]:
    """`right/<attribute>`: 1 where the judge's best value is the one asked for; and `right/all`."""
    right = {}
    for name, wanted in asked.attributes.items():
        index = np.array([tuple(values[name]).index(value) for value in wanted])
        right[f"right/{name}"] = (np.asarray(logits[name]).argmax(axis=1) == index).astype(np.float64)
    return {**right, ALL_RIGHT: np.prod(list(right.values()), axis=0)}


def path_measures(frames: Frames, asked: Asked) -> dict[str, PerClip]:
    """Direction, speed and steadiness of the centroid's path; no net is involved.

    Raises TooFewFrames under three: any two points lie on a line.
    """
    if frames.shape[1] < 3:
        raise TooFewFrames(
            f"the path of {frames.shape[1]} frames says nothing of jitter: 3 or more are needed"
        )
    motion = fit_motion(centroid_path(frames))
    along = (motion.velocity * asked.heading).sum(axis=1)
    across = np.linalg.norm(motion.velocity - along[:, None] * asked.heading, axis=1)
    low, high = asked.speed.T
    return {
        "path/direction": (along > across).astype(np.float64),
        "path/speed_error": np.maximum(low - along, 0) + np.maximum(along - high, 0),
        "path/jitter": motion.jitter,
    }


def gradient_energy(frames: Frames) -> PerClip:
    """Mean squared difference of neighbouring pixels, in 0..1: falls with blur, rises with noise."""
    x = frames.astype(np.float32) / 255
    energy = [np.square(np.diff(x, axis=axis)).mean(axis=(1, 2, 3, 4), dtype=np.float64) for axis in (2, 3)]
    return energy[0] + energy[1]


def near_black(frames: Frames) -> Float[np.ndarray, " n"]:
    """Share of each clip's frames that are nearly black."""
    return (frames.mean(axis=(2, 3, 4)) < NEAR_BLACK).mean(axis=1)


def psnr(frames: Frames, others: Frames) -> PerClip:
    """Peak signal-to-noise ratio between clips, dB; at most 60 (equal to about a quarter of a grey level)."""
    error = frames.astype(np.float32) - others
    mse = np.square(error).mean(axis=(1, 2, 3, 4), dtype=np.float64)
    return 10 * np.log10(255**2 / np.maximum(mse, 255**2 * 1e-6))


def latent_rmse(latents: Float[np.ndarray, "n c f h w"], others: Float[np.ndarray, "n c f h w"]) -> PerClip:
    """Root mean square difference per clip, in latent units (about one deviation of the data)."""
    return np.sqrt(np.square(latents - others).mean(axis=(1, 2, 3, 4), dtype=np.float64))


def spread(features: Float[np.ndarray, "n d"], captions: Sequence[str]) -> PerClip:
    """Mean distance of each clip to the others of its caption; 0 where a caption has a single clip."""
    out = np.zeros(len(features))
    names = np.asarray(captions)
    for name in set(captions):
        rows = np.flatnonzero(names == name)
        if len(rows) > 1:
            apart = np.linalg.norm(features[rows, None] - features[None, rows], axis=-1)
            out[rows] = apart.sum(axis=1) / (len(rows) - 1)
    return out
