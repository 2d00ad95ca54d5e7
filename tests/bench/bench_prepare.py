"""Clips per second of the prepare job's flow over a bare decord loop.

    python tests/bench/bench_prepare.py [clips] [codec folder]

All on the same mp4 files, drawn first. `decord`: open and decode every file, nothing else, in a process of
its own. `decord + codec`: the same and the codec, one clip after the other, in that process. `decoder`:
probe, decode in the child process, cut, as a decode actor does, without Ray. `flow`: the whole flow on Ray
with one decode and one encode actor, from the first committed shard to the last, so without the seconds in
which processes start; `job` with them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raydistill.artifacts import fingerprint
from raydistill.flow import connect
from raydistill.latents.flow import EncodeOptions, encode_shards
from raydistill.latents.shards import finished_shard
from raydistill.models.codec import build_tiny_codec
from raydistill.world.clips import Cut, cut_video
from raydistill.world.decoder import Decoder
from raydistill.world.drawing import World
from raydistill.world.flow import DecodeOptions, decode_shards
from raydistill.world.folder import list_sources
from raydistill.world.inputs import deal, examine
from raydistill.world.media import Limits

PER_SHARD = 32
CUT = Cut(num_frames=16, out_fps=8, height=32, width=32)

BARE = """
import sys, time, decord
paths = sys.argv[2:]
def frames(path):
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()
frames(paths[0])
began = time.perf_counter()
for path in paths:
    frames(path)
decoded = time.perf_counter() - began
import torch
from raydistill.latents.encode import frames_to_tensor
from raydistill.models.codec import load_codec
torch.set_num_threads(1)
codec = load_codec(sys.argv[1])
with torch.inference_mode():
    began = time.perf_counter()
    for path in paths:
        codec.encode(frames_to_tensor([frames(path)]))
    encoded = time.perf_counter() - began
print(len(paths) / decoded, len(paths) / encoded)
"""


def measure_bare(codec: Path, paths: list[str]) -> tuple[float, float]:
    """Clips per second of decord, and of decord and codec, in a fresh process."""
    said = subprocess.check_output([sys.executable, "-c", BARE, str(codec), *paths], text=True)
    decoded, encoded = map(float, said.splitlines()[-1].split())
    return decoded, encoded


def measure_decoder(paths: list[str]) -> float:
    """Clips per second through the decode child, after its start."""
    with Decoder() as decoder:
        list(cut_video(decoder, paths[0], CUT, Limits()))
        began = time.perf_counter()
        clips = sum(1 for path in paths for _ in cut_video(decoder, path, CUT, Limits()))
        return clips / (time.perf_counter() - began)


def measure_flow(codec: Path, world: Path, out: Path) -> tuple[float, float]:
    """Clips per second between the first and the last committed shard, and from the very beginning."""
    sources, _ = list_sources(world, "videos")
    shards = deal([examine(world, s, policy="filter") for s in sources], PER_SHARD)
    identity = {"bench": 1}
    options = DecodeOptions(root=str(world), lane="video", cut=CUT, limits=Limits())
    encoding = EncodeOptions(
        folder=str(out), identity=identity, codec=str(codec), text_tokens=8, text_width=32
    )
    began, times, clips = time.perf_counter(), [], []
    for manifest in encode_shards(decode_shards(shards, options), encoding):
        times.append(time.perf_counter())
        clips.append(manifest.facts["clips"])
    assert sum(clips) == len(sources)
    assert all(finished_shard(out, s.name, identity) for s in shards), fingerprint(identity)
    return sum(clips[1:]) / (times[-1] - times[0]), sum(clips) / (times[-1] - began)


def main(num_clips: int = 384, codec: str = "") -> None:
    """Measure and print one JSON line."""
    with tempfile.TemporaryDirectory() as place:
        world = Path(place, "world")
        world.mkdir()
        World(str(world)).draw(range(num_clips))
        paths = sorted(str(path) for path in world.glob("*.mp4"))
        folder = Path(codec or Path(place, "codec"))
        if not codec:
            build_tiny_codec(0).save(folder)
        rates = dict(zip(("decord", "decord + codec"), measure_bare(folder, paths), strict=True))
        rates["decoder"] = measure_decoder(paths)
        with connect(num_cpus=2, object_store_mib=200):
            rates["flow"], rates["job"] = measure_flow(folder, world, Path(place, "out"))
    ratio = {f"{a} / {b}": round(rates[a] / rates[b], 3) for a, b in PAIRS}
    print(json.dumps({"clips_per_s": {k: round(v, 1) for k, v in rates.items()}, "ratio": ratio}))


PAIRS = (("decoder", "decord"), ("flow", "decord"), ("flow", "decord + codec"))

if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, str), sys.argv[1:], strict=False)))
