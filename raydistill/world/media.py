"""Look into one video and read frames from it. Runs in the decode child; imports neither torch nor ray.

`probe` reads packets, not frames, and decides which decoder may be trusted with the file. Frames are
addressed by presentation time, never by the container's frame numbers: those are wrong in files with an edit
list.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np

from raydistill.errors import MediaError

CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores", "ffv1"})
"""Codecs that are let in; everything else FFmpeg can decode is attack surface nobody needs."""

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg"
"""FFmpeg's names of the containers that are let in."""

DECORD_CODECS = frozenset({"h264", "hevc", "vp9", "mpeg4"})
"""Codecs for which decord was measured to give PyAV's bytes. It cannot open AV1."""

DECORD_HEADS = (b"....ftyp", b"\x1aE\xdf\xa3", b"RIFF....AVI ")
"""How the containers begin that decord may open; a dot is any byte. It has no whitelist, and what is
both a playlist and a video would make it read other files. A playlist is text, and none of these is."""

DECORD_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuv444p", "gbrp"})
"""Pixel formats for which it does; in 10-bit video the two differ by up to 103 levels."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one file may ask for; everything is checked before a frame is decoded."""

    max_bytes: int = 4 * 2**30
    max_duration_s: float = 3600.0
    max_pixels: int = 4096 * 2304
    max_packets: int = 500_000


@dataclass(frozen=True)
class Probe:
    """What a file holds, from its headers and packets alone."""

    width: int
    height: int
    codec: str
    time_base: tuple[int, int]
    pts: list[int]
    """Presentation time of every shown frame, ascending, in units of `time_base`."""
    decoder: str
    """Which decoder to use, 'decord' or 'pyav'."""
    why: tuple[str, ...] = field(default=())
    """Why not decord: container, edit_list, vfr, rotated, codec, pixel_format; no_decord without one."""
    rotation: int = 0
    """Degrees by which players turn the picture, counter-clockwise."""

    @property
    def times(self) -> np.ndarray:
        """Seconds at which each frame is shown, float64, from 0."""
        return (np.asarray(self.pts, dtype=np.int64) - self.pts[0]) * (self.time_base[0] / self.time_base[1])

    @property
    def gap_s(self) -> float:
        """Median time between two frames, in seconds; 0 for a single frame."""
        return float(np.median(np.diff(self.times))) if len(self.pts) > 1 else 0.0

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame's start to the last one's end."""
        return float(self.times[-1]) + self.gap_s

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Probe":
        """Inverse of `to_json`."""
        return cls(**{**values, "time_base": tuple(values["time_base"]), "why": tuple(values["why"])})


def require_file(path: str, max_bytes: int) -> bytes:
    """Check a file's kind and size; return its first 64 bytes. Raises MediaError."""
    status = os.lstat(path)
    if not os.path.isfile(path) or os.path.islink(path):
        raise MediaError(
            "policy", "not a plain file"
        )  # a FIFO would block, a link may point outside the folder
    if not status.st_size:
        raise MediaError("zero_bytes", "the file is empty")
    if status.st_size > max_bytes:
        raise MediaError("too_large", f"{status.st_size} bytes, at most {max_bytes} allowed")
    with open(path, "rb") as stream:
        return stream.read(64)


def probe(path: str, limits: Limits) -> Probe:
    """Read headers and packets of a video. Raises MediaError with a reason code."""
    head = require_file(path, limits.max_bytes)
    with _opened(path, head) as container:
        if not container.streams.video:
            raise MediaError("not_media", "no video stream")
        stream = container.streams.video[0]
        _require_sane(stream, limits)
        packets, first = _read_packets(container, stream, limits)
        found = _judge(stream, packets, first, head, limits)
        _require_whole(container, found)
        return found


def _opened(path: str, head: bytes) -> Any:
    """Open a container; turn FFmpeg's errors into reason codes."""
    try:
        # neither playlists nor URLs: a file must not make the decoder read anything but itself
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        return av.open(path, options=options, metadata_errors="replace")
    except MemoryError as full:
        raise MediaError("oom", "opening needs more memory than allowed") from full
    except (av.FFmpegError, ValueError) as failed:
        isobmff = head[4:8] in (b"ftyp", b"mdat", b"wide", b"free", b"skip", b"moov")
        reason = "moov_missing" if isobmff and not _has_box(path, b"moov") else "not_media"
        known = isobmff or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF", b"\x00\x00\x01\xba")
        reason = "truncated" if known and reason == "not_media" else reason
        raise MediaError(reason, str(failed)) from failed


def _has_box(path: str, name: bytes) -> bool:
    """Whether an MP4 file has a whole top-level box of that name."""
    size = os.stat(path).st_size
    with open(path, "rb") as stream:
        at = 0
        while at + 8 <= size:
            stream.seek(at)
            header = stream.read(16)
            length = int.from_bytes(header[:4], "big")
            length = {0: size - at, 1: int.from_bytes(header[8:16], "big")}.get(length, length)
            if header[4:8] == name:
                return at + length <= size
            if length < 8:
                return False
            at += length
    return False


def _require_sane(stream: Any, limits: Limits) -> None:
    """Check codec and picture size, as the headers claim them."""
    context = stream.codec_context
    codec = context.codec.canonical_name if context else "unknown"
    if codec not in CODECS:
        raise MediaError("codec_unsupported", f"codec {codec}; allowed are {', '.join(sorted(CODECS))}")
    if context.width * context.height > limits.max_pixels:
        raise MediaError(
            "too_large", f"{context.width} x {context.height} pixels, at most {limits.max_pixels} allowed"
        )
    if not context.width or not context.height:
        raise MediaError("decode_error", "no picture size: no frame of the file can be decoded")


@contextmanager
def _faults_called(reason: str) -> Iterator[None]:
    """Turn what FFmpeg complains about into a MediaError; running out of memory is no fault of the data."""
    try:
        yield
    except MemoryError:  # FFmpeg's is also an FFmpegError
        raise
    except av.FFmpegError as failed:
        raise MediaError(reason, str(failed)) from failed


def _read_packets(container: Any, stream: Any, limits: Limits) -> tuple[list[Any], Any]:
    """Return (pts, key, discard, corrupt) of every packet in file order, and the first frame.

    One frame is decoded because only frames tell how far the picture is turned.
    """
    packets, first = [], None
    stream.codec_context.thread_count = 1
    with _faults_called("truncated"):
        for packet in container.demux(stream):
            if first is None:
                with _faults_called("decode_error"):
                    first = next(iter(packet.decode()), None)
            if packet.size:  # the last one is empty and flushes the decoder
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard, packet.is_corrupt))
            if len(packets) > limits.max_packets:
                raise MediaError("too_large", f"more than {limits.max_packets} packets")
    if any(corrupt for *_, corrupt in packets):
        raise MediaError("truncated", "a packet is cut short")
    if 0 < len(packets) < stream.frames:
        raise MediaError("truncated", f"{len(packets)} of {stream.frames} frames are there")
    if first is None:
        raise MediaError("decode_error", "no frame can be decoded")
    return packets, first


def _judge(stream: Any, packets: list[Any], first: Any, head: bytes, limits: Limits) -> Probe:
    """Check times and choose the decoder."""
    shown = [pts for pts, _, discard, _ in packets if not discard]
    if not shown:
        raise MediaError("decode_error", "no frame is shown")
    if any(pts is None for pts in shown):
        raise MediaError("decode_error", "frames without a presentation time")
    if not packets[0][1]:
        raise MediaError("decode_error", "the first frame is no key frame")
    pts = sorted(shown)
    if len(set(pts)) != len(pts):
        raise MediaError("decode_error", "two frames have the same presentation time")
    base = stream.time_base or Fraction(1, 1)
    if (pts[-1] - pts[0]) * base > limits.max_duration_s:
        raise MediaError(
            "too_large", f"{float((pts[-1] - pts[0]) * base):.0f} s, at most {limits.max_duration_s} allowed"
        )
    codec, rotation = stream.codec_context.codec.canonical_name, round(first.rotation / 90) * 90
    doubts = {
        "container": not any(re.match(begin, head, re.DOTALL) for begin in DECORD_HEADS),
        "edit_list": len(shown) != len(packets) or pts[0] != (stream.start_time or 0),
        "vfr": not is_constant(pts),
        "rotated": rotation != 0,
        "codec": codec not in DECORD_CODECS,
        "pixel_format": first.format.name not in DECORD_FORMATS,
        "no_decord": importlib.util.find_spec("decord") is None,
    }
    why = tuple(name for name, doubt in doubts.items() if doubt)
    return Probe(
        width=first.width,
        height=first.height,
        codec=codec,
        time_base=(base.numerator, base.denominator),
        pts=pts,
        decoder="pyav" if why else "decord",
        why=why,
        rotation=rotation,
    )


def _require_whole(container: Any, found: Probe) -> None:
    """Check a Matroska file's length against its header; nothing else tells that it was cut short."""
    if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
        promised = container.duration / av.time_base
        if found.duration_s < promised - 0.5 - 2 * found.gap_s:
            raise MediaError("truncated", f"{found.duration_s:.2f} s of {promised:.2f} s are there")


def is_constant(pts: Sequence[int]) -> bool:
    """Whether frames are evenly spaced, up to one tick of rounding: Matroska counts milliseconds."""
    gaps = np.diff(pts)
    if not len(gaps):
        return True
    mean = (pts[-1] - pts[0]) / len(gaps)
    off_grid = np.asarray(pts) - pts[0] - mean * np.arange(len(pts))
    return bool(np.median(gaps) > 0 and np.abs(off_grid).max() <= 1.0)


def read_frames(path: str, found: Probe, pts: Sequence[int], decoder: str) -> tuple[np.ndarray, str]:
    """Return the frames shown at the given times, native size: uint8 (f, h, w, 3), and why not by `decoder`.

    What decord cannot read, PyAV reads; then the second value says what decord said, else it is empty. Raises
    MediaError if PyAV cannot read it either.
    """
    why = ""
    try:
        frames = {"decord": _read_decord, "pyav": _read_pyav}[decoder](path, found, pts)
    except MediaError as failed:
        if decoder == "pyav":
            raise
        why = str(failed)
        try:
            frames = _read_pyav(path, found, pts)
        except MediaError as again:
            raise MediaError(again.reason, f"{again.message}; before that, decord: {why}") from again
    if found.rotation:
        frames = np.ascontiguousarray(np.rot90(frames, found.rotation // 90, axes=(1, 2)))
    return frames, why


def _read_decord(path: str, found: Probe, pts: Sequence[int]) -> np.ndarray:
    """Read with decord; check that the frames are those of the plan."""
    import decord  # here, since not every machine has it

    number = {value: i for i, value in enumerate(found.pts)}
    wanted = [number[value] for value in pts]
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(found.pts):
            raise MediaError(
                "frame_mismatch", f"decord sees {len(reader)} frames, the packets are {len(found.pts)}"
            )
        ascending = sorted(set(wanted))
        frames = reader.get_batch(ascending).asnumpy()
        shown = reader.get_frame_timestamp([0, *ascending])[:, 0]
    except (decord.DECORDError, IndexError, RuntimeError) as failed:  # the last where it cannot open a file
        raise MediaError("decode_error", readable(failed)) from failed
    late = np.abs(shown[1:] - shown[0] - found.times[ascending]).max()  # both count from the first frame
    if late > found.gap_s / 2 + 1e-3:
        raise MediaError("frame_mismatch", f"decord's frames are up to {late:.3f} s off")
    place = {value: i for i, value in enumerate(ascending)}
    return frames[[place[value] for value in wanted]]


def _read_pyav(path: str, found: Probe, pts: Sequence[int]) -> np.ndarray:
    """Read with PyAV from the key frame before the first wanted time on."""
    frames: dict[int, np.ndarray] = {}
    wanted = set(pts)
    with _opened(path, b"") as container, _faults_called("decode_error"):
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if min(pts) > found.pts[0]:
            container.seek(min(pts), stream=stream, backward=True, any_frame=False)
        for frame in container.decode(stream):
            _require_sound(frame, found)
            if frame.pts in wanted:
                frames[frame.pts] = frame.to_ndarray(format="rgb24")
            if len(frames) == len(wanted):
                return np.stack([frames[value] for value in pts])
    raise MediaError("frame_mismatch", f"{len(frames)} of {len(wanted)} planned frames came")


def _require_sound(frame: Any, found: Probe) -> None:
    """Check a decoded frame. Raises MediaError."""
    if (frame.height, frame.width) != (found.height, found.width):
        raise MediaError("frame_mismatch", f"a frame of {frame.width} x {frame.height} in between")
    if frame.is_corrupt:
        raise MediaError("decode_error", f"the frame at {frame.time:.3f} s is damaged")


def readable(error: BaseException) -> str:
    """Return one short printable line of a decoder's message; decord quotes whole stack traces."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:300]
