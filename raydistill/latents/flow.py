"""Ray Data: decoded shards in, committed shards out; only summaries reach the driver."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset

from raydistill.artifacts import Manifest, fingerprint
from raydistill.flow import ours_unwrapped
from raydistill.latents.encode import Encoder
from raydistill.latents.shards import latent_row, write_quarantine, write_shard
from raydistill.models.prompts import build_text
from raydistill.models.protocols import TextEncoder
from raydistill.models.text import NULL, WordVectors, save_null


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What an encode actor is told."""

    folder: str
    """Where shards go."""
    identity: Mapping[str, Any]
    codec: str
    text: Mapping[str, Any]
    """Arguments of `build_text`."""
    dtype: str = "float32"
    batch_size: int = 16
    rows_per_group: int = 4
    tried_with: Mapping[str, float] = field(default_factory=dict)
    """The decoder's limits, kept with each shard: a file that failed is tried again when they are raised."""


def encode_shards(
    decoded: Dataset,
    options: EncodeOptions,
    *,
    num_actors: int = 1,
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
) -> Iterator[Manifest]:
    """Encode and commit decoded shards in a pool of actors; yield each one's manifest as it is committed.

    Errors that raydistill raises on purpose come back as they were.
    """
    done = decoded.map_batches(
        EncodeShards,
        fn_constructor_args=(options,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor,
    )
    for row in ours_unwrapped(done.iter_rows()):
        yield Manifest.read(Path(options.folder) / row["manifest"])


class EncodeShards:
    """An encode actor: the clips of a shard in, its files and manifest on disk."""

    def __init__(self, options: EncodeOptions):
        """Load the models."""
        torch.set_num_threads(1)
        self.options, device = options, _device()
        self.encoder = Encoder(
            options.codec,
            text=build_text(**options.text, device=device),
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=device,
        )
        write_null(options.folder, self.encoder.text)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode all shards of a block."""
        shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in table.to_pylist():
            shards[row["shard"]].append(row)
        return pa.table({"manifest": [self._commit(name, rows) for name, rows in shards.items()]})

    def _commit(self, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write one shard; return its manifest's name."""
        if {row["file"] for row in rows} != set(range(rows[0]["files"])):
            raise AssertionError(f"shard {name} came in pieces: blocks must not be split")
        options, details = self.options, [json.loads(row["detail"]) for row in rows]
        clips = [(row, about) for row, about in zip(rows, details, strict=True) if row["outcome"] == "clip"]
        bad = [about for row, about in zip(rows, details, strict=True) if row["outcome"] == "quarantined"]
        write_quarantine(options.folder, name, bad)
        write_shard(
            options.folder,
            name,
            self._encode(clips),
            options.identity,
            order=rows[0]["order"],
            rows_per_group=options.rows_per_group,
            facts={**shard_facts(rows, details), "tried_with": dict(options.tried_with)},
        )
        return f"{name}.manifest.json"

    def _encode(self, clips: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Return the rows of a shard."""
        frames = [np.frombuffer(row["frames"], np.uint8).reshape(row["shape"]) for row, _ in clips]
        encoded = self.encoder(frames, [about["caption"] for _, about in clips])
        return [
            latent_row(
                latents,
                text,
                about["caption"],
                sample_id(about, self.options.identity),
                source_uri=about["uri"],
                source_sha256=about["sha256"],
                **{key: about[key] for key in ("start_s", "end_s", "fps_src", "lane")},
            )
            for (latents, text), (_, about) in zip(encoded, clips, strict=True)
        ]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"


def write_null(folder: str | Path, text: TextEncoder) -> None:
    """Write the empty caption's embedding beside the shards, where it is not known without the encoder."""
    if not isinstance(text, WordVectors) and not (Path(folder) / NULL).is_file():
        save_null(Path(folder), text([""])[0])


def ensure_null(options: EncodeOptions, gpus: float = 0.0) -> None:
    """Have a worker write the empty caption's embedding if no encode actor was needed, and none is there."""
    if not options.text["pipeline"] or (Path(options.folder) / NULL).is_file():
        return
    alone = ray.remote(num_gpus=gpus)(
        lambda: write_null(options.folder, build_text(**options.text, device=_device()))
    )
    ray.get(alone.remote())


def sample_id(about: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Return the id of a clip: from the file's content, the part of it, and how it was prepared."""
    return fingerprint([about["sha256"], about["start_s"], about["end_s"], fingerprint(identity)])


def shard_facts(rows: Sequence[Mapping[str, Any]], details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what became of each file: one outcome per file, in order, and the seconds of video kept.

    `fallbacks` counts the files in which PyAV stood in for decord.
    """
    outcomes: dict[int, list[str]] = {}
    seconds = 0.0
    for row, about in zip(rows, details, strict=True):
        outcomes[row["file"]] = [about["uri"], about["sha256"], row["outcome"], about.get("reason", "")]
        seconds += about["end_s"] - about["start_s"] if row["outcome"] == "clip" else 0.0
    clips = sum(row["outcome"] == "clip" for row in rows)
    return {
        "files": [outcomes[number] for number in sorted(outcomes)],
        "clips": clips,
        "video_s": round(seconds, 6),
        "fallbacks": len({about["uri"] for about in details if about.get("fallback")}),
    }
