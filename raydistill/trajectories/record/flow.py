"""Ray Data: a pool of recorders, shard by shard; what a stopped run has finished is kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydistill.artifacts import LatentStore, Manifest, fingerprint
from raydistill.config.prepare import RecordConfig
from raydistill.flow import ours_unwrapped
from raydistill.shards import point_to, whole_shard, write_artifact
from raydistill.trajectories.record.recorder import Recorder, Told, identity_of, shards_of
from raydistill.trajectories.store import POINTER, TrajectoryStore


def record_trajectories(
    config: RecordConfig, latents: str | Path, output: str | Path, *, report: Callable[[int], None]
) -> Path:
    """Record `config.num_paths` paths for the captions of a latents artifact; return the artifact's folder.

    Ray must be connected. `report` gets the number of paths that are there. Raises what `identity_of` raises.
    """
    store = LatentStore(latents)
    identity = identity_of(config, store)
    made = fingerprint(identity)
    folder = Path(output).resolve() / made[:12]
    told = Told(config, str(store.folder.resolve()), str(folder), identity)
    shards = shards_of(config)
    done = {name: found for name in shards if (found := whole_shard(folder, name, identity))}
    count = sum(len(shards[name]) for name in done)
    report(count)
    todo = [name for name in shards if name not in done]
    for name, manifest in _recorded(told, todo, list(shards), shards) if todo else ():
        done[name] = manifest
        count += len(shards[name])
        report(count)
    write_artifact(folder, [done[n] for n in shards], identity, {"paths": count}, kind=TrajectoryStore.kind)
    point_to(output, folder.name, made, POINTER)
    return folder


def _recorded(
    told: Told, todo: Sequence[str], names: Sequence[str], shards: Mapping[str, range]
) -> Iterator[tuple[str, Manifest]]:
    """Yield (name, manifest) of each shard as it is committed."""
    items = [
        {"name": name, "order": names.index(name), "first": shards[name].start, "count": len(shards[name])}
        for name in todo
    ]
    config = told.config
    flow = ray.data.from_items(items, override_num_blocks=len(items)).map(
        cast(Any, RecordShards),
        fn_constructor_args=(told,),
        compute=ActorPoolStrategy(size=min(config.num_actors, len(items))),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
    )
    flow.context.enable_progress_bars = False
    flow.context.raise_original_map_exception = True
    for row in ours_unwrapped(flow.iter_rows()):
        yield row["name"], Manifest.read(Path(told.folder) / f"{row['name']}.manifest.json")


class RecordShards:
    """A recording actor."""

    def __init__(self, told: Told):
        """Load the teacher."""
        torch.set_num_threads(1)
        gpu = torch.cuda.is_available() and ray.get_gpu_ids()
        self.recorder = Recorder(told, "cuda" if gpu else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Record one shard."""
        numbers = range(row["first"], row["first"] + row["count"])
        self.recorder.commit(row["name"], int(row["order"]), numbers)
        return {"name": row["name"]}
