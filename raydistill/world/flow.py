"""Ray Data over paths: draw the small world, hash inputs, decode shards of files into clips."""

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset

from raydistill.errors import MediaError, PrepareError
from raydistill.flow import ours_unwrapped
from raydistill.world.clips import FILTERED, Clip, Cut, cut_image, cut_video
from raydistill.world.decoder import Decoder
from raydistill.world.drawing import World
from raydistill.world.folder import Source
from raydistill.world.inputs import Input, Shard, examine, require_unchanged
from raydistill.world.media import Limits

DECODED = pa.schema(
    [
        ("shard", pa.string()),
        ("order", pa.int64()),
        ("files", pa.int64()),
        ("file", pa.int64()),
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("frames", pa.large_binary()),
        ("shape", pa.list_(pa.int64())),
    ]
)
"""One row per clip, or per file that gave none. `files`: how many the shard has; `detail`: JSON."""

PART_FILES, PART_BYTES = 512, 2**30
"""How much one task of `index` hashes, so that it takes seconds."""

PARTS_AT_ONCE = 1024
"""Tasks of `index` that wait or run at the same time."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What a decode actor is told."""

    root: str
    lane: str
    cut: Cut
    limits: Limits
    deadline_s: float = 60.0
    memory_bytes: int = 4 * 2**30
    recycle_after: int = 2000
    audit_every: int = 100
    child: str = "raydistill.world.decode_child"


def write_world(world: World, count: int, *, report: Callable[[int], None]) -> list[str]:
    """Draw the small world's training clips, or images, as files with captions; return their names.

    Files that are there are kept, so a stopped run goes on. `report` gets the number of files written so far.
    Raises StaleArtifact if the folder holds another world.
    """
    world.open()
    missing = sorted(set(range(count)) - world.finished(count))
    written = count - len(missing)
    report(written)
    if missing:
        chunks = [missing[start : start + 100] for start in range(0, len(missing), 100)]
        items = [{"numbers": json.dumps(chunk)} for chunk in chunks]
        with _data_context():
            flow = ray.data.from_items(items, override_num_blocks=len(items)).map(
                partial(_draw_chunk, world=world)
            )
            for row in ours_unwrapped(flow.iter_rows()):
                written += row["written"]
                report(written)
    return [world.path(i).name for i in range(count)]


def _draw_chunk(row: Mapping[str, Any], world: World) -> dict[str, int]:
    """One block of the drawing flow."""
    numbers = json.loads(row["numbers"])
    try:
        world.draw(numbers)
    except OSError as failed:
        again = "nothing half-written counts; run the same command again when it can be written to"
        raise PrepareError(f"{world.folder}: {failed.strerror}: {again}") from failed
    return {"written": len(numbers)}


def index(
    root: str | Path,
    sources: Sequence[Source],
    *,
    policy: str,
    captions: Mapping[str, str] | None,
    known: Mapping[tuple[str, int, int], str],
    report: Callable[[int, int], None],
) -> list[Input]:
    """Examine all files, in tasks. `known`: hashes of files seen by an earlier run, by uri, bytes, mtime.

    `report` gets the number of files examined so far, and of bytes read for it.
    """
    task, found, files, read = ray.remote(_examine_part), list[list[Input]](), 0, 0
    waiting = iter(_parts(sources))
    running: dict[ray.ObjectRef[list[Input]], tuple[int, int]] = {}
    while True:
        for part in itertools.islice(waiting, PARTS_AT_ONCE - len(running)):
            words = None if captions is None else {s.uri: captions[s.uri] for s in part if s.uri in captions}
            hashes = [known.get((s.uri, s.bytes, s.mtime_ns), "") for s in part]
            unread = sum(s.bytes for s, sha in zip(part, hashes, strict=True) if not sha)
            running[task.remote(str(root), part, hashes, policy, words)] = len(found), unread
            found.append([])
        if not running:
            return [one for part in found for one in part]
        (done,), _ = ray.wait(list(running), num_returns=1)
        number, unread = running.pop(done)
        found[number] = ray.get(done)
        files, read = files + len(found[number]), read + unread
        report(files, read)


def _parts(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Yield the files in portions that take about the same time."""
    part: list[Source] = []
    for source in sources:
        part.append(source)
        if len(part) == PART_FILES or sum(s.bytes for s in part) >= PART_BYTES:
            yield part
            part = []
    if part:
        yield part


def _examine_part(
    root: str, part: Sequence[Source], hashes: Sequence[str], policy: str, captions: Mapping[str, str] | None
) -> list[Input]:
    """One task of `index`."""
    pairs = zip(part, hashes, strict=True)
    return [examine(root, s, policy=policy, captions=captions, sha256=sha) for s, sha in pairs]


def decode_shards(
    shards: Sequence[Shard], options: DecodeOptions, *, num_actors: int = 1, cpus_per_actor: float = 1.0
) -> Dataset:
    """Decode shards in a pool of actors: a dataset of one block per shard, see `DECODED`."""
    items = [
        {"shard": json.dumps({"name": s.name, "order": s.order, "inputs": [i.to_json() for i in s.inputs]})}
        for s in shards
    ]
    with _data_context():
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            DecodeShards,
            fn_constructor_args=(options,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(num_actors, len(items))),
            num_cpus=cpus_per_actor,
        )


class DecodeShards:
    """A decode actor: shards of paths in, clips out. A bad file becomes a row with a reason."""

    def __init__(self, options: DecodeOptions):
        """Start the decode child with the first file."""
        self.options = options
        self.decoder = Decoder(
            deadline_s=options.deadline_s,
            memory_bytes=options.memory_bytes,
            recycle_after=options.recycle_after,
            child=options.child,
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Decode the shards of a block."""
        shards = [json.loads(text) for text in table.column("shard").to_pylist()]
        rows = [row for shard in shards for row in self._decode_shard(shard)]
        return pa.Table.from_pylist(rows, schema=DECODED)

    def _decode_shard(self, shard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of one shard."""
        inputs = [Input(**values) for values in shard["inputs"]]
        for number, known in enumerate(inputs):
            mark = {"shard": shard["name"], "order": shard["order"], "files": len(inputs), "file": number}
            for row in self._decode_file(known):
                yield {**mark, **row}

    def _decode_file(self, known: Input) -> list[dict[str, Any]]:
        """Return the clips of a file, all or none."""
        began, about = time.monotonic(), {"uri": known.uri, "sha256": known.sha256, "caption": known.caption}
        try:
            return [clip_row(clip, {**about, "lane": self.options.lane}) for clip in self._cut(known)]
        except MediaError as bad:
            about |= {"reason": bad.reason, "message": bad.message, "bytes": known.bytes, "stage": "decode"}
            about |= {"seconds": round(time.monotonic() - began, 3), "host": socket.gethostname()}
            outcome = "filtered" if bad.reason in FILTERED else "quarantined"
            return [{"outcome": outcome, "detail": json.dumps(about)}]

    def _cut(self, known: Input) -> list[Clip]:
        """Cut a file into clips."""
        options = self.options
        require_unchanged(options.root, known)
        path = str(Path(options.root, known.uri))
        if options.lane == "image":
            return list(cut_image(self.decoder, path, options.cut, options.limits))
        audit = bool(options.audit_every) and int(known.sha256[:8], 16) % options.audit_every == 0
        return list(cut_video(self.decoder, path, options.cut, options.limits, audit=audit))


def clip_row(clip: Clip, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a clip as a row: plain bytes, so that no Ray type gets into the data."""
    detail = {name: value for name, value in vars(clip).items() if name != "frames"}
    pixels = {"frames": clip.frames.tobytes(), "shape": list(clip.frames.shape)}
    return {"outcome": "clip", "detail": json.dumps({**about, **detail}), **pixels}


@contextmanager
def _data_context() -> Iterator[None]:
    """Build datasets whose blocks are never split, since a block is a shard, and that draw no bars.

    An actor's error comes as it was raised: Ray Data's own wrapper loses its cause on the way.
    """
    context = DataContext.get_current()
    ours = {
        "target_max_block_size": None,
        "enable_progress_bars": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in ours}
    for name, value in ours.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
