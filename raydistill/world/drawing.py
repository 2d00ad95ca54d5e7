"""The small world as files: clips as mp4, images as png, with caption and truth beside each."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image

from raydistill.artifacts import file_sha256, write_json
from raydistill.errors import CorruptArtifact, StaleArtifact
from raydistill.world import degrade as degrading
from raydistill.world import sprites
from raydistill.world.degrade import degrade
from raydistill.world.sprites import FPS, Scene, draw_scene, render

ENCODING = {"crf": "4", "preset": "medium", "bf": "0", "g": "16", "x264-params": "no-asm=1"}
"""x264 with full colour resolution and hardly any loss: the codec shall be taught by what was drawn.

Without its assembly, which for frames this small reads memory that nobody wrote: one clip in a hundred or so
then had other bytes, and the world another fingerprint.
"""

WORLD = "world.json"


@dataclass(frozen=True)
class World:
    """A folder of the small world: its clips as mp4 files, or single frames of other scenes as pictures."""

    folder: str
    seed: int = 0
    severity: float = 0.0
    """How poor the clips are, in [0, 1], see `degrade`."""
    images: bool = False
    size: int = sprites.SIZE
    """Side of the frames in pixels, a multiple of 32; poor clips have 32."""

    def open(self) -> None:
        """Mark the folder as holding this world. Raises StaleArtifact if it holds another one."""
        ours: dict[str, Any] = {"seed": self.seed, "size": self.size}
        ours |= {"renderer": file_sha256(sprites.__file__)}
        ours |= {"images": "png"} if self.images else {"encoding": ENCODING}
        if self.severity:
            ours |= {"severity": self.severity, "degrading": file_sha256(degrading.__file__)}
        mark = Path(self.folder) / WORLD
        if not mark.exists():
            write_json(mark, ours)
            return
        try:
            theirs = dict(json.loads(mark.read_bytes()))
        except (ValueError, TypeError) as failed:
            raise CorruptArtifact(f"{mark} cannot be read: {failed}") from failed
        if theirs != ours:
            held = f"seed {theirs.get('seed')}, severity {theirs.get('severity', 0)}"
            held += f", size {theirs.get('size', sprites.SIZE)}"
            raise StaleArtifact(
                f"{self.folder} holds the small world of {held}, or drawn by other code: "
                "remove the folder, or choose another source.path"
            )

    def scene(self, number: int) -> Scene:
        """Return a scene by number; those of images are no clip's."""
        return draw_scene(self.seed * 2**32 + number + (2**31 if self.images else 0))

    def path(self, number: int) -> Path:
        """Return where a clip or image is."""
        name = f"image_{number:06d}.png" if self.images else f"clip_{number:06d}.mp4"
        return Path(self.folder, name)

    def finished(self, count: int) -> set[int]:
        """Return the numbers of what is whole: the sidecar, written last, knows the file's size."""
        done = set()
        for number in range(count):
            path = self.path(number)
            try:
                if json.loads(path.with_suffix(".json").read_bytes())["bytes"] == path.stat().st_size:
                    done.add(number)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return done

    def draw(self, numbers: Sequence[int]) -> None:
        """Draw clips or images by number; captions that are held out are never drawn."""
        for number in numbers:
            scene, path = self.scene(number), self.path(number)
            frames = degrade(render(scene, self.size), self.severity, number)
            beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
            try:
                if self.images:
                    Image.fromarray(frames[number % len(frames)]).save(beside)
                else:
                    write_video(beside, frames, FPS)
                size = beside.stat().st_size
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)
            said = scene.attributes.image_caption() if self.images else scene.attributes.caption()
            _write_sidecar(
                path.with_suffix(".json"), {"caption": said, "truth": scene.truth(), "bytes": size}
            )


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
