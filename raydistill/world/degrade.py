"""What happens to a clip in the field: bad exposure, blur, noise, a watermark, compression; by severity 0..1.

The setting of MCM: videos of one's own domain are poor, their motion is not. Everything is drawn from a seed,
and severity 0 changes no byte.
"""

import hashlib
import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d

STOPS = 0.5
"""Exposure at severity 1 is up to this many stops too dark or too bright, one value per clip."""
BLUR_PX = 1.0
"""Deviation of the Gaussian blur at severity 1; a clip's own is within a fifth of it."""
NOISE = 0.03
"""Deviation of the sensor's noise at severity 1, in units of full brightness."""
OPACITY = 0.55
"""Of the watermark at severity 1."""
QUALITY = (95, 40)
"""JPEG's, of every frame, at severity 0+ and 1."""

GLYPH = np.array(
    [
        [1, 1, 1, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 0, 1, 0],
    ],
    dtype=bool,
)
"""The watermark: a station's sign, white, always in the same place."""
MARGIN = 2
"""Pixels between the watermark and the lower right corner."""


def watermark_box(height: int, width: int) -> tuple[slice, slice]:
    """Return rows and columns of a frame that the watermark covers."""
    rows, columns = GLYPH.shape
    bottom, right = height - MARGIN, width - MARGIN
    return slice(bottom - rows, bottom), slice(right - columns, right)


def degrade(frames: np.ndarray, severity: float, seed: int) -> np.ndarray:
    """Return uint8 (f, h, w, 3) as a poor camera and a station would give it; severity in [0, 1].

    The motion is left as it is. Raises ValueError outside the range.
    """
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity {severity}: must be in [0, 1]")
    if severity == 0:
        return frames
    digest = hashlib.sha256(f"degrade/{seed}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
    x = frames.astype(np.float32) / 255
    x = x * np.float32(2 ** (severity * rng.uniform(-STOPS, STOPS)))
    deviation = severity * BLUR_PX * rng.uniform(0.8, 1.2)
    for axis in (1, 2):
        x = gaussian_filter1d(x, deviation, axis=axis, mode="nearest")
    x = np.clip(x + severity * NOISE * rng.standard_normal(x.shape, dtype=np.float32), 0, 1)
    rows, columns = watermark_box(*x.shape[1:3])
    shade = np.float32(severity * OPACITY) * GLYPH[:, :, None]
    x[:, rows, columns] = (1 - shade) * x[:, rows, columns] + shade
    quality = round(QUALITY[0] + severity * (QUALITY[1] - QUALITY[0]))
    return np.stack([_compressed(frame, quality) for frame in np.rint(x * 255).astype(np.uint8)])


def _compressed(frame: np.ndarray, quality: int) -> np.ndarray:
    """One frame through JPEG with halved colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer, formats=("JPEG",)))
