"""From a file to clips: cut by time, resize outside the decoder, with one kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import av
import numpy as np
import PIL
from PIL import Image

from raydistill.errors import MediaError
from raydistill.world.decoder import Decoder
from raydistill.world.media import Limits, Probe

FILTERED = frozenset({"too_short", "missing_caption", "duplicate"})
"""Reasons for leaving out a file that is in order; every other reason puts it into quarantine."""

RESIZE_KERNEL = "pillow-bicubic-antialias, centre crop"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How clips are cut from a video."""

    num_frames: int
    """Frames of a clip."""
    out_fps: float
    """Frames per second of a clip."""
    height: int
    """Rows of a frame, in pixels."""
    width: int
    """Columns of a frame, in pixels."""
    stride_s: float = 0.0
    """Seconds from one clip's start to the next one's; 0: clips follow each other without overlap."""
    max_clips: int = 1
    """At most so many clips of one video, spread evenly over it."""


@dataclass(frozen=True)
class Clip:
    """A clip and where it came from."""

    frames: np.ndarray
    """Uint8 (f, h, w, 3)."""
    start_s: float
    end_s: float
    fps_src: float
    fallback: str = ""
    """What decord said of the file, where PyAV had to stand in for it."""


def decoder_versions() -> dict[str, str]:
    """Return names and versions of everything that turns bytes into frames, for the fingerprint."""
    found = {"av": av.__version__, "pillow": PIL.__version__, "resize": RESIZE_KERNEL}
    found |= {name: ".".join(map(str, number)) for name, number in sorted(av.library_versions.items())}
    try:
        found["decord"] = version("decord")
    except PackageNotFoundError:
        found["decord"] = "absent"
    return found


def plan_clips(found: Probe, cut: Cut) -> list[tuple[float, list[int]]]:
    """Return (start in seconds, presentation times of the frames) of each clip.

    At every moment of the plan the frame is taken that a player would show. Raises MediaError too_short.
    """
    span = (cut.num_frames - 1) / cut.out_fps
    stride = cut.stride_s or cut.num_frames / cut.out_fps
    rounding = 0.5 * found.time_base[0] / found.time_base[1] + 1e-9  # containers round times to ticks
    room = found.duration_s - span
    if room <= 0 or (len(found.pts) < 2 <= cut.num_frames):
        raise MediaError("too_short", f"{found.duration_s:.3f} s, a clip needs more than {span:.3f} s")
    count = max(1, int(np.ceil(room / stride - 1e-9)))
    chosen = np.unique(np.linspace(0, count - 1, min(count, cut.max_clips)).round().astype(int))
    plans = []
    for start in chosen * stride:
        moments = start + np.arange(cut.num_frames) / cut.out_fps
        at = np.searchsorted(found.times, moments + rounding, side="right") - 1
        plans.append((float(start), [found.pts[i] for i in at]))
    return plans


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale frames to cover (height, width), crop the centre: uint8 (f, h, w, 3) to (f, height, width, 3)."""
    rows, columns = frames.shape[1:3]
    if (rows, columns) == (height, width):
        return frames
    scale = min(rows / height, columns / width)
    top, left = (max(0.0, side / 2) for side in (rows - height * scale, columns - width * scale))
    box = (left, top, min(columns, left + width * scale), min(rows, top + height * scale))
    resized = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC, box=box) for f in frames]
    return np.stack([np.asarray(image) for image in resized])


def cut_video(
    decoder: Decoder, path: str, cut: Cut, limits: Limits, *, audit: bool = False
) -> Iterator[Clip]:
    """Yield the clips of a video, one at a time. Raises MediaError with a reason code.

    With `audit`, decord's frames must equal PyAV's byte for byte.
    """
    found = decoder.probe(path, limits)
    for start, pts in plan_clips(found, cut):
        frames, fallback = decoder.frames(path, found, pts, found.decoder)
        by_decord = found.decoder == "decord" and not fallback
        if audit and by_decord and not np.array_equal(frames, decoder.frames(path, found, pts, "pyav")[0]):
            raise MediaError("frame_mismatch", f"decord and PyAV disagree in the clip at {start:.3f} s")
        fps = 1 / found.gap_s if found.gap_s else 0.0
        end = start + cut.num_frames / cut.out_fps
        yield Clip(fit(frames, cut.height, cut.width), start, end, fps, fallback)


def cut_image(decoder: Decoder, path: str, cut: Cut, limits: Limits) -> Iterator[Clip]:
    """Yield a picture as a clip of one frame. Raises MediaError."""
    yield Clip(fit(decoder.image(path, limits), cut.height, cut.width), 0.0, 0.0, 0.0)
