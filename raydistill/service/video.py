"""Frames -> the files that a client gets: mp4, thumbnail, spritesheet."""

import io
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CODER = {"crf": "18", "preset": "veryfast"}
SHEET_FRAMES = 16
"""A spritesheet shows so many frames at most, evenly spread."""


def mp4(frames: np.ndarray, fps: int, about: Mapping[str, Any] | None = None) -> bytes:
    """Encode uint8 (f, h, w, 3) as H.264; `about` goes into the file's comment, as JSON.

    Odd sizes, which players cannot show with halved colour resolution, keep it whole.
    """
    even = frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    with tempfile.TemporaryDirectory() as folder:  # a file: its index is moved to the front at the end
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            if about:
                container.metadata["comment"] = json.dumps(dict(about), sort_keys=True)
            stream = container.add_stream("libx264", rate=fps, options=CODER)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p" if even else "yuv444p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()


def webp(picture: np.ndarray, longest: int | None = None) -> bytes:
    """Encode one uint8 (h, w, 3), made smaller if its longer side exceeds `longest`."""
    image = Image.fromarray(picture)
    if longest is not None and max(image.size) > longest:
        image.thumbnail((longest, longest))
    out = io.BytesIO()
    image.save(out, format="webp", quality=85)
    return out.getvalue()


def spritesheet(frames: np.ndarray, longest: int = 256) -> bytes:
    """Lay frames out in rows of a near-square sheet, each at most `longest` wide or high."""
    picked = frames[np.unique(np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int))]
    scale = min(1.0, longest / max(frames.shape[1:3]))
    height, width = (max(1, round(side * scale)) for side in frames.shape[1:3])
    columns = math.ceil(math.sqrt(len(picked)))
    rows = math.ceil(len(picked) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, frame in enumerate(picked):
        image = Image.fromarray(frame).resize((width, height))
        sheet.paste(image, (i % columns * width, i // columns * height))
    return webp(np.asarray(sheet))
