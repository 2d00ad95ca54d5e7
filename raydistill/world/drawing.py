"""The small world as files: every clip an mp4 with a caption and its truth beside it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags

from raydistill.artifacts import file_sha256, write_json
from raydistill.errors import CorruptArtifact, StaleArtifact
from raydistill.world import sprites
from raydistill.world.sprites import FPS, draw_scene, render

ENCODING = {"crf": "4", "preset": "medium", "bf": "0", "g": "16", "x264-params": "no-asm=1"}
"""x264 with full colour resolution and hardly any loss: the codec shall be taught by what was drawn.

Without its assembly, which for frames this small reads memory that nobody wrote: one clip in a hundred or so
then had other bytes, and the world another fingerprint.
"""

WORLD = "world.json"


def open_world(folder: str | Path, seed: int) -> None:
    """Mark a folder as holding the small world of a seed. Raises StaleArtifact if it holds another one."""
    ours = {"seed": seed, "renderer": file_sha256(sprites.__file__), "encoding": ENCODING}
    mark = Path(folder) / WORLD
    if not mark.exists():
        write_json(mark, ours)
        return
    try:
        theirs = dict(json.loads(mark.read_bytes()))
    except (ValueError, TypeError) as failed:
        raise CorruptArtifact(f"{mark} cannot be read: {failed}") from failed
    if theirs != ours:
        raise StaleArtifact(
            f"{folder} holds the small world of seed {theirs.get('seed')}, or drawn by other code: "
            "remove the folder, or choose another source.path"
        )


def scene_seed(seed: int, number: int) -> int:
    """Return the seed of a clip's scene."""
    return seed * 2**32 + number


def finished_clips(folder: str | Path, num_clips: int) -> set[int]:
    """Return the numbers of the clips that are whole: the sidecar, written last, knows the video's size."""
    done = set()
    for number in range(num_clips):
        video = Path(folder, f"clip_{number:06d}.mp4")
        try:
            if json.loads(video.with_suffix(".json").read_bytes())["bytes"] == video.stat().st_size:
                done.add(number)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return done


def draw_clips(folder: str | Path, numbers: Sequence[int], seed: int) -> None:
    """Draw clips by number; captions that are held out are never drawn."""
    for number in numbers:
        scene = draw_scene(scene_seed(seed, number))
        video = Path(folder, f"clip_{number:06d}.mp4")
        beside = video.with_name(f".{video.stem}.{os.getpid()}.mp4")
        try:
            write_video(beside, render(scene), FPS)
            size = beside.stat().st_size
            os.replace(beside, video)
        finally:
            beside.unlink(missing_ok=True)
        sidecar = {"caption": scene.attributes.caption(), "truth": scene.truth(), "bytes": size}
        _write_sidecar(video.with_suffix(".json"), sidecar)


def _write_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    """Write beside, then rename. Not synced to the disk: a clip lost in a power cut is drawn again."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(sidecar, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 (f, h, w, 3) as H.264 in an mp4, the same bytes every time."""
    with av.open(str(path), "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=ENCODING)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
