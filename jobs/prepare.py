"""Media files become latents.

    python jobs/prepare.py --config jobs/tiny/prepare.yaml [key=value ...]
    python jobs/prepare.py source.kind=videos source.path=FOLDER encode.codec=CODEC clip.num_frames=81 ...

Draw the small world or list a folder; hash; decode in child processes; encode; commit shard by shard. Run the
same command again after a stop, or with more files: finished shards are kept and their files not read again.
"""

import sys

from raydistill.config.load import dump, from_command_line, read_early, run
from raydistill.config.prepare import PrepareConfig

if __name__ == "__main__":
    read_early(PrepareConfig)

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raydistill.artifacts import LATENTS_SCHEMA_VERSION, MANIFEST, Manifest, fingerprint, write_json
from raydistill.errors import PrepareError, disk_full_explained
from raydistill.flow import connect
from raydistill.latents.encode import NORMALISATION, models_identity, require_codec
from raydistill.latents.flow import EncodeOptions, encode_shards, ensure_null
from raydistill.latents.progress import meter
from raydistill.latents.shards import adopt_shard, finished_shard, write_left_out, write_quarantine
from raydistill.latents.tally import Tally
from raydistill.models.prompts import prompts_identity
from raydistill.models.text import WordVectors
from raydistill.shards import point_to, write_artifact
from raydistill.trajectories.record.flow import record_trajectories
from raydistill.world.clips import FILTERED, Cut, decoder_versions
from raydistill.world.drawing import World
from raydistill.world.flow import DecodeOptions, decode_shards, index, write_world
from raydistill.world.folder import (
    SUFFIXES,
    Source,
    describe_source,
    list_sources,
    missing_captions_message,
    read_captions_file,
)
from raydistill.world.inputs import Input, Shard, deal, inputs_identity, mark_duplicates
from raydistill.world.media import Limits


def identity_of(config: PrepareConfig) -> dict[str, Any]:
    """All that shapes rows, but for the files; what only shapes the run (actors, deadlines) is not in it."""
    clip, limits = config.clip, config.limits
    text = config.encode.text
    identity = (
        prompts_identity(text, config.encode.text_length, config.encode.text_precision)
        if text
        else WordVectors(config.encode.text_tokens, config.encode.text_width).identity
    )
    return {
        "stage": "prepare",
        "schema_version": LATENTS_SCHEMA_VERSION,
        "lane": config.source.lane,
        "caption_policy": config.source.caption_policy,
        "clip": {name: getattr(clip, name) for name in sorted(vars(clip))},
        "limits": {
            n: getattr(limits, n) for n in ("max_bytes", "max_duration_s", "max_packets", "max_pixels")
        },
        "dtype": config.encode.dtype,
        "normalisation": NORMALISATION,
        "models": models_identity(config.encode.codec, identity),
        "decoders": decoder_versions(),
    }


def find_sources(config: PrepareConfig) -> list[Source]:
    """Draw the small world, or list the user's folder."""
    source = config.source
    if source.kind in SUFFIXES:
        found, others = list_sources(source.path, source.kind)
        print(f"{len(found)} {source.kind} below {source.path}; {others} other files, captions not counted")
        return found
    with meter("drawing", source.num_clips) as progress, disk_full_explained(Path(source.path)):
        world = World(
            source.path,
            source.seed,
            source.severity,
            size=source.size,
            images=source.kind == "sprite_images",
        )
        names = write_world(world, source.num_clips, report=progress.show)
    return [describe_source(Path(source.path, name), name) for name in names]


def look_at(config: PrepareConfig, sources: list[Source]) -> list[Input]:
    """Hash files and find captions; earlier hashes are believed where size and time of change agree."""
    source, memory = config.source, Path(config.output) / "inputs.json"
    root = str(Path(source.path).absolute())
    try:
        remembered = json.loads(memory.read_bytes())
        known = {tuple(key): sha for *key, sha in remembered["files"]} if remembered["root"] == root else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}  # only a shortcut
    captions = read_captions_file(source.captions) if source.captions else None
    with meter("hashing", len(sources)) as progress:
        progress.show(0)
        found = index(
            source.path,
            sources,
            policy=source.caption_policy,
            captions=captions,
            known=known,
            report=lambda files, read: progress.show(files, read=read),
        )
    write_json(
        memory, {"root": root, "files": [[i.uri, i.bytes, i.mtime_ns, i.sha256] for i in found if i.sha256]}
    )
    missing = [i.uri for i in found if i.reason == "missing_caption"]
    if missing and source.caption_policy == "error":
        raise PrepareError(missing_captions_message(missing))
    return mark_duplicates(found)


def artifact_identity(
    config: PrepareConfig, identity: Mapping[str, Any], inputs: list[Input]
) -> dict[str, Any]:
    """Everything that shapes the artifact: what shapes the rows, and the files."""
    return {
        **identity,
        "inputs": inputs_identity(inputs),
        "files_per_shard": config.shard.files_per_shard,
    }


def decoder_limits(config: PrepareConfig) -> dict[str, float]:
    """The limits that may decide a file's fate but no row's contents, as shards remember them."""
    return {"deadline_s": config.limits.deadline_s, "memory_gib": config.limits.memory_gib}


def find_finished(
    config: PrepareConfig, identity: Mapping[str, Any], folder: Path, shards: list[Shard]
) -> dict[str, Manifest]:
    """Return what need not be done: shards finished here, or in the folder of an earlier run's inputs."""
    limits, donors = decoder_limits(config), defaultdict[str, list[Path]](list)
    for record in sorted(folder.parent.glob("*/*-*.manifest.json")):
        if record.parent != folder:
            donors[record.name.removesuffix(".manifest.json")].append(record.parent)
    done: dict[str, Manifest] = {}
    for name in (shard.name for shard in shards):
        found = finished_shard(folder, name, identity, limits)
        found = found or adopt_shard(folder, name, identity, limits, donors[name])
        if found:
            done[name] = found
    return done


def encode(
    config: PrepareConfig,
    identity: Mapping[str, Any],
    whole: Mapping[str, Any],
    folder: Path,
    inputs: list[Input],
) -> Tally:
    """Prepare all shards that are not finished, then write the manifest over all of them.

    `identity` is that of the rows, `whole` that of the artifact.
    """
    tolerance, shards = config.tolerance, deal(inputs, config.shard.files_per_shard)
    tally = Tally(
        len(inputs),
        tolerance.max_bad_fraction,
        tolerance.max_bad_in_a_row,
        tolerance.allowed_bad_files,
        where=str(folder),
    )
    settled = [i for i in inputs if i.reason]
    write_quarantine(
        folder, "listing", [{**i.to_json(), "stage": "list"} for i in settled if i.reason not in FILTERED]
    )
    outcomes = [("filtered" if i.reason in FILTERED else "quarantined", i.reason) for i in settled]
    tally.add(outcomes, neighbours=False)
    done = find_finished(config, identity, folder, shards)
    for manifest in done.values():
        tally.add_shard(manifest.facts)
    tally.clips_before, seconds_before = tally.clips, tally.video_s
    todo = [s for s in shards if s.name not in done]
    if todo:
        (folder / MANIFEST).unlink(missing_ok=True)  # what it names is about to be written again
    with meter("preparing", len(inputs)) as progress:
        progress.show(tally.seen, bad=tally.bad)
        for manifest in decode_and_encode(config, identity, folder, todo) if todo else ():
            done[next(iter(manifest.files)).removesuffix(".parquet")] = manifest
            tally.add_shard(manifest.facts)
            new = {"clips": tally.clips - tally.clips_before, "video_s": tally.video_s - seconds_before}
            progress.show(tally.seen, bad=tally.bad, **new)
    tally.require_complete()
    ensure_null(encode_options(config, identity, folder), config.encode.gpus_per_actor)
    kept_out = [(i.uri, "filtered" if i.reason in FILTERED else "quarantined", i.reason) for i in settled]
    kept_out += [(f[0], *f[2:]) for s in shards for f in done[s.name].facts["files"] if f[2] != "clip"]
    write_left_out(folder, kept_out)
    write_artifact(folder, [done[s.name] for s in shards], whole, facts=tally.counts())
    return tally


def encode_options(config: PrepareConfig, identity: Mapping[str, Any], folder: Path) -> EncodeOptions:
    """What encode actors are told."""
    encoding = config.encode
    return EncodeOptions(
        folder=str(folder.absolute()),
        identity=identity,
        codec=reachable(encoding.codec),
        text={
            "pipeline": reachable(encoding.text) if encoding.text else "",
            "length": encoding.text_length,
            "precision": encoding.text_precision,
            "num_tokens": encoding.text_tokens,
            "width": encoding.text_width,
        },
        dtype=encoding.dtype,
        batch_size=encoding.batch_size,
        rows_per_group=config.shard.rows_per_group,
        tried_with=decoder_limits(config),
    )


def reachable(name: str) -> str:
    """A folder by its absolute path, as workers have other working folders; a name on the hub as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def decode_and_encode(
    config: PrepareConfig, identity: Mapping[str, Any], folder: Path, shards: list[Shard]
) -> Iterator[Manifest]:
    """Decode and encode shards on the cluster; yield their manifests as they are committed."""
    clip, limits, decode, encoding = config.clip, config.limits, config.decode, config.encode
    decoded = decode_shards(
        shards,
        DecodeOptions(
            root=str(Path(config.source.path).absolute()),
            lane=identity["lane"],
            cut=Cut(
                num_frames=clip.num_frames,
                out_fps=clip.out_fps,
                height=clip.height,
                width=clip.width,
                stride_s=clip.stride_s,
                max_clips=clip.max_clips_per_video,
            ),
            limits=Limits(**identity["limits"]),
            deadline_s=limits.deadline_s,
            memory_bytes=int(limits.memory_gib * 2**30),
            recycle_after=decode.recycle_after,
            audit_every=decode.audit_every,
        ),
        num_actors=decode.num_actors,
        cpus_per_actor=decode.cpus_per_actor,
    )
    return encode_shards(
        decoded,
        encode_options(config, identity, folder),
        num_actors=min(encoding.num_actors, len(shards)),
        cpus_per_actor=encoding.cpus_per_actor,
        gpus_per_actor=encoding.gpus_per_actor,
    )


def prepare(config: PrepareConfig) -> Path:
    """Run the job; return the artifact's folder."""
    began = time.monotonic()
    require_codec(config.encode.codec, config.clip, images=config.source.lane == "image")
    identity = identity_of(config)
    with (
        connect(config.cluster.num_cpus, config.cluster.object_store_mib),
        disk_full_explained(Path(config.output)),
    ):
        inputs = look_at(config, find_sources(config))
        whole = artifact_identity(config, identity, inputs)
        made = fingerprint(whole)
        folder = Path(config.output) / made[:12]
        tally = encode(config, identity, whole, folder, inputs)
        point_to(config.output, made[:12], made)
    seconds, made_now = time.monotonic() - began, tally.clips - tally.clips_before
    speed = {
        "seconds": round(seconds, 3),
        "clips_made": made_now,
        "clips_per_s": round(made_now / seconds, 3),
    }
    write_json(folder / "stats.json", {**tally.counts(), **speed, "fingerprint": made})
    dump(config, folder / "config.yaml")
    print(tally.summary())
    print(f"{tally.clips} clips, {tally.video_s:.0f} s of video; {made_now} made now, in {seconds:.1f} s")
    print(f"latents: {folder} (fingerprint {made})")
    return folder


def record(config: PrepareConfig) -> Path:
    """Record a teacher's paths for the captions of prepared latents; return the artifact's folder."""
    with (
        connect(config.cluster.num_cpus, config.cluster.object_store_mib),
        disk_full_explained(Path(config.output)),
        meter("recording", config.record.num_paths) as progress,
    ):
        folder = record_trajectories(
            config.record, config.source.path, config.output, report=lambda paths: progress.show(paths)
        )
    dump(config, folder / "config.yaml")
    print(f"trajectories: {folder}")
    return folder


def main() -> None:
    """Read the settings and run."""
    config, _ = from_command_line(PrepareConfig, sys.argv[1:])
    (record if config.source.kind == "trajectories" else prepare)(config)


if __name__ == "__main__":
    run(main)
