"""Clips as pictures: strips of frames (PNG) and a wall of moving clips (GIF), a row per sampler."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Frames = UInt8[np.ndarray, "n f h w 3"]
PAPER, INK = (255, 255, 255), (40, 40, 40)
LABEL_PX, LINE_PX, GAP_PX = 128, 14, 6
CHARACTER_PX = 6
ENLARGED_PX = 48
"""Larger frames are shown as they are."""


def draw_strips(
    clips: Mapping[str, Frames], captions: Sequence[str], num_shown: int = 4, zoom: int = 2
) -> bytes:
    """PNG: a row per sampler, and for each caption `num_shown` frames spread over the clip.

    `clips` maps a sampler's label to its clips, clip i of caption i; lengths may differ between labels.
    """
    count = len(next(iter(clips.values())))
    cells = {
        label: [_side_by_side(_spread(clip, num_shown)) for clip in all_] for label, all_ in clips.items()
    }
    zoom = zoom if _side(clips) <= ENLARGED_PX else 1
    return _png(_wall(cells, captions[:count], zoom))


def _side(clips: Mapping[str, Frames]) -> int:
    """Long side of the frames."""
    return max(next(iter(clips.values())).shape[2:4])


def _spread(clip: UInt8[np.ndarray, "f h w 3"], num_shown: int) -> UInt8[np.ndarray, "k h w 3"]:
    """Frames spread over a clip, the first and the last among them."""
    return clip[np.linspace(0, len(clip) - 1, min(num_shown, len(clip))).round().astype(int)]


def draw_gif(clips: Mapping[str, Frames], captions: Sequence[str], fps: float = 8, zoom: int = 3) -> bytes:
    """GIF that loops: a row per sampler, a column per caption, one palette for all frames."""
    length = next(iter(clips.values())).shape[1]
    zoom = zoom if _side(clips) <= ENLARGED_PX else 1
    pages = [
        _wall({label: [clip[number] for clip in frames] for label, frames in clips.items()}, captions, zoom)
        for number in range(length)
    ]
    # One palette from first and last page: a palette per page would shimmer.
    sample = Image.fromarray(np.concatenate([np.asarray(pages[0]), np.asarray(pages[-1])]))
    palette = sample.quantize(64)
    reduced = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    out = io.BytesIO()
    reduced[0].save(
        out,
        "GIF",
        save_all=True,
        append_images=reduced[1:],
        duration=round(1000 / fps),
        loop=0,
        optimize=False,
    )
    return out.getvalue()


def fit_under(limit_bytes: int, draw, counts: Sequence[int]) -> bytes:
    """Draw with the first of `counts` captions whose file is within the limit, else with the last of them."""
    data = b""
    for count in counts:
        data = draw(count)
        if len(data) <= limit_bytes:
            break
    return data


LARGEST_PX, LONGEST = 128, 24
"""Side in pixels and number of frames of the largest clips that are shown."""


def reduced(frames: Frames) -> Frames:
    """Clips as they are shown, a long side of LARGEST_PX and LONGEST frames of each at most."""
    count, (height, width) = frames.shape[1], frames.shape[2:4]
    picked = frames[:, np.linspace(0, count - 1, min(count, LONGEST)).round().astype(int)]
    side = max(height, width)
    if side <= LARGEST_PX:
        return picked
    size = (max(1, width * LARGEST_PX // side), max(1, height * LARGEST_PX // side))
    small = [
        [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in clip]
        for clip in picked
    ]
    return np.array(small)


def _side_by_side(frames: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Frames from left to right, a hairline of paper between them."""
    parted = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=PAPER[0])
    return np.concatenate(list(parted), axis=1)[:, :-1]


def _wall(cells: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], zoom: int) -> Image.Image:
    height, width = (zoom * size for size in next(iter(cells.values()))[0].shape[:2])
    texts = [textwrap.wrap(caption, max(6, width // CHARACTER_PX)) for caption in captions]
    header = 4 + LINE_PX * max(len(lines) for lines in texts)
    size = (LABEL_PX + len(captions) * (width + GAP_PX), header + len(cells) * (height + GAP_PX))
    wall = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(wall), ImageFont.load_default(11)
    lefts = [LABEL_PX + column * (width + GAP_PX) for column in range(len(captions))]
    for left, lines in zip(lefts, texts, strict=True):
        for number, line in enumerate(lines):
            pen.text((left, 1 + number * LINE_PX), line, fill=INK, font=font)
    for row, (label, pictures) in enumerate(cells.items()):
        top = header + row * (height + GAP_PX)
        pen.text((4, top + height // 2 - LINE_PX // 2), label, fill=INK, font=font)
        for left, picture in zip(lefts, pictures, strict=False):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            wall.paste(tile, (left, top))
    return wall


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
