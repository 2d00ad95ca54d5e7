"""Media files, good and bad in every way we know of, made by PyAV and by hand.

Every frame of a good video carries its number, so that a test can tell which frames came.
"""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96
BITS = 8


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames with their number in the top row of blocks, black or white, over a moving pattern."""
    y, x = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    block = width // BITS
    for number, frame in enumerate(frames):
        frame[...] = np.stack([(x * 2 + number * 3) % 200, (y * 3) % 200, (x + y) % 200], axis=-1)
        for bit in range(BITS):
            frame[: height // 4, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return frames


def numbers_in(frames: np.ndarray) -> list[int]:
    """Read the numbers back, at any size."""
    height, width = frames.shape[1:3]
    rows, block = slice(height // 16, height // 5), width / BITS
    columns = [slice(int((b + 0.3) * block), int((b + 0.7) * block) + 1) for b in range(BITS)]
    return [sum(1 << b for b, c in enumerate(columns) if frame[rows, c].mean() > 128) for frame in frames]


def write(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    fps: Fraction | int = 24,
    pixels: str = "yuv420p",
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    movflags: str = "",
) -> Path:
    """Write a video; `pts` in frames replaces the even spacing."""
    flags = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", container_options=flags) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = pts[number] if pts else number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def as_before(make: Callable[..., Path], *args: object, **options: object) -> Path:
    """Call it and take back what SVT-AV1 does as root: real-time priority for caller and children."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return make(*args, **options)
    finally:
        os.sched_setscheduler(0, policy, priority)


def cut_without_recoding(source: Path, target: Path, first: int) -> Path:
    """Stream-copy from a frame that is no key frame: an edit list hides the frames before it."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as cut:
        stream = whole.streams.video[0]
        out = cut.add_stream_from_template(stream)
        shift = round(first * stream.duration / stream.frames)
        for packet in whole.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, out
                cut.mux(packet)
    return target


def rotate(source: Path, target: Path) -> Path:
    """Ask players for a quarter turn, through the matrix in the track header."""
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def claim_size(source: Path, target: Path, size: int) -> Path:
    """Make the headers of an H.264 file claim size x size pixels, in the stream and the container."""
    data = bytearray(source.read_bytes())
    at = data.index(b"avcC") + 4 + 6  # version, profile, compatibility, level, length size, number of sets
    length = int.from_bytes(data[at : at + 2], "big")
    bits = "".join(
        f"{byte:08b}" for byte in bytes(data[at + 2 : at + 2 + length]).replace(b"\0\0\3", b"\0\0")
    )
    place = 8 + 24  # unit header; profile, constraints, level

    def skip() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        value = int(bits[place + zeros : place + 2 * zeros + 1], 2) - 1
        place += 2 * zeros + 1
        return value

    skip()  # id
    skip()  # log2 of the largest frame number
    if skip() == 0:  # order of pictures
        skip()
    skip()  # reference frames
    place += 1  # gaps
    begin = place
    skip(), skip()
    code = f"{size // 16:b}"
    code = "0" * (len(code) - 1) + code
    bits = bits[:begin] + code + code + bits[place:]
    bits = bits[: bits.rindex("1") + 1]
    bits += "0" * (-len(bits) % 8)
    unit = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    grown = struct.pack(">H", len(unit)) + unit
    extra = len(grown) - 2 - length
    data[at : at + 2 + length] = grown
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"):
        place = data.index(box) - 4
        data[place : place + 4] = struct.pack(">I", struct.unpack(">I", data[place : place + 4])[0] + extra)
    entry = data.index(b"avc1", data.index(b"stsd")) + 28
    data[entry : entry + 4] = struct.pack(">HH", size - 1, size - 1)
    target.write_bytes(data)
    return target


def write_sound(path: Path) -> Path:
    """A file without pictures."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        for start in range(0, 8000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def playlist_and_video(path: Path) -> Path:
    """MPEG-TS with a playlist of another file in front: some FFmpegs would play that one instead."""
    secret = write(
        path.with_name(".secret.ts"), np.full((72, HEIGHT, WIDTH, 3), 250, np.uint8), options={"bf": "0"}
    )
    video = write(path.with_name(".shown.ts"), numbered(72), options={"bf": "0"}).read_bytes()
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{secret.absolute().as_uri()}\n#EXT-X-ENDLIST\n"
    head = text.encode()
    path.write_bytes(head + b"\n" * (-len(head) % 188) + video)
    return path


def has_encoder(name: str) -> bool:
    """Whether FFmpeg can write it here."""
    try:
        av.Codec(name, "w")
    except ValueError:
        return False
    return True


GOOD: dict[str, Callable[[Path], object]] = {
    "h264.mp4": lambda p: write(p, numbered(72)),
    "lossless.mp4": lambda p: write(p, numbered(72), pixels="yuv444p", options={"crf": "0", "bf": "0"}),
    "ntsc.mov": lambda p: write(p, numbered(72), fps=Fraction(30000, 1001)),
    "matroska.mkv": lambda p: write(p, numbered(72)),
    "hevc.mp4": lambda p: write(p, numbered(60), codec="libx265", options={"x265-params": "log-level=none"}),
    "vp9.webm": lambda p: write(p, numbered(60), codec="libvpx-vp9", options={"deadline": "realtime"}),
    "mpeg4.avi": lambda p: write(p, numbered(60), codec="mpeg4", options={"qscale": "2"}),
    "av1.mp4": lambda p: as_before(write, p, numbered(60), codec="libsvtav1", options={"preset": "12"}),
    "ten_bit.mp4": lambda p: write(p, numbered(72), pixels="yuv420p10le"),
    "vfr.mp4": lambda p: write(p, numbered(48), pts=[n + n // 3 * 2 for n in range(48)]),
    "edit_list.mp4": lambda p: cut_without_recoding(_long(p), p, 20),
    "rotated.mp4": lambda p: rotate(write(p, numbered(72)), p),
    "transport.ts": lambda p: write(p, numbered(72)),
    "playlist_too.ts": playlist_and_video,
}
"""Files that must be kept, all long enough for one clip of 16 frames at 8 fps."""

ENCODERS = {"hevc.mp4": "libx265", "vp9.webm": "libvpx-vp9", "av1.mp4": "libsvtav1"}


def _long(beside: Path) -> Path:
    """A video with few key frames; hidden, so that no folder listing counts it."""
    options = {"g": "50", "bf": "2", "sc_threshold": "0"}
    return write(beside.with_name(".long.mp4"), numbered(100), options=options)


def _truncated(path: Path) -> None:
    data = write(path, numbered(72), movflags="+faststart").read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _truncated_matroska(path: Path) -> None:
    data = write(path, numbered(72)).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def _scrambled(path: Path) -> None:
    """The index is whole, the pictures are noise."""
    data = bytearray(write(path, numbered(72), movflags="+faststart").read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = np.random.default_rng(0).bytes(len(data) - start)
    path.write_bytes(data)


def _without_moov(path: Path) -> None:
    data = write(path, numbered(72)).read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])


BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zero.mp4": ("zero_bytes", lambda p: p.touch()),
    "garbage.mp4": ("not_media", lambda p: p.write_bytes(np.random.default_rng(1).bytes(5000))),
    "text.mp4": ("not_media", lambda p: p.write_text("To whom it may concern:\n" * 50)),
    "playlist.mp4": ("not_media", lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\nh264.mp4\n#EXT-X-ENDLIST\n")),
    "sound.mp4": ("not_media", write_sound),
    "truncated.mp4": ("truncated", _truncated),
    "truncated.mkv": ("truncated", _truncated_matroska),
    "no_moov.mp4": ("moov_missing", _without_moov),
    "scrambled.mp4": ("decode_error", _scrambled),
    "bomb.mp4": ("too_large", lambda p: claim_size(write(p, numbered(20)), p, 16000)),
    "bigger_bomb.mp4": ("decode_error", lambda p: claim_size(write(p, numbered(20)), p, 16384)),
    "huffyuv.avi": ("codec_unsupported", lambda p: write(p, numbered(72), codec="huffyuv", pixels="yuv422p")),
    "one_frame.mp4": ("too_short", lambda p: write(p, numbered(1))),
    "short.mp4": ("too_short", lambda p: write(p, numbered(24))),
    "link.mp4": ("policy", lambda p: p.symlink_to("h264.mp4")),
    "pipe.mp4": ("policy", lambda p: os.mkfifo(p)),
}
"""Files that must not be kept, with the reason."""

BAD_IMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zero.png": ("zero_bytes", lambda p: p.touch()),
    "garbage.jpg": ("not_media", lambda p: p.write_bytes(np.random.default_rng(2).bytes(5000))),
    "truncated.png": ("truncated", lambda p: p.write_bytes(picture(p)[:-100])),
    "bomb.png": ("too_large", lambda p: p.write_bytes(_claim_png_size(picture(p), 16384))),
}


def picture(path: Path) -> bytes:
    """Write a picture, in the format that the name says; return its bytes."""
    Image.fromarray(numbered(3)[2]).save(path)
    return path.read_bytes()


def _claim_png_size(data: bytes, size: int) -> bytes:
    head = b"IHDR" + struct.pack(">II", size, size) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def build(folder: Path, *, captions: bool = True) -> dict[str, str]:
    """Write the whole zoo; return {file: reason}, '' for the good ones."""
    expected = {}
    for name, make in GOOD.items():
        if has_encoder(ENCODERS.get(name, "mpeg4")):
            make(folder / name)
            expected[name] = ""
    for name, (reason, make) in BAD.items():
        make(folder / name)
        expected[name] = reason
    if captions:
        for name in expected:
            (folder / name).with_suffix(".txt").write_text(f"a video called {name}\n")
    return expected
