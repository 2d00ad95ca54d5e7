"""Follows a teacher's ODE from noise and keeps the state at every node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raydistill import draws
from raydistill.artifacts import LatentStore, Manifest, fingerprint
from raydistill.config.prepare import RecordConfig
from raydistill.consistency.schedule import TimeGrid
from raydistill.consistency.solver import euler
from raydistill.models.folders import teacher_digest
from raydistill.models.guidance import guide_teacher_by
from raydistill.models.teacher import load_whole_teacher, read_schedule, require_fit, schedule_from_dict
from raydistill.models.text import null_of
from raydistill.shards import tensor_columns, write_table
from raydistill.trajectories.store import SCHEMA_VERSION, TrajectoryStore, node_column, schema


def identity_of(config: RecordConfig, latents: LatentStore) -> dict[str, Any]:
    """All that shapes recorded paths: teacher, guidance, solver, grid, schedule, noise, and captions.

    Raises MissingArtifact, and StaleArtifact if the teacher does not take such latents.
    """
    row = latents.row(0)
    require_fit(config.teacher, row.latents.shape, row.text.shape)
    asked = asked_of_paths(config.teacher, config.guidance_range, config.grid)
    return {
        "stage": "trajectories",
        "schema_version": SCHEMA_VERSION,
        **asked,
        "seed": config.seed,
        "num_paths": config.num_paths,
        "dtype": config.dtype,
        "latents": latents.fingerprint,
        "models": latents.manifest.identity.get("models", {}),
    }


def shards_of(config: RecordConfig) -> dict[str, range]:
    """Name each shard for the paths it holds, in order.

    The division is no part of the identity, so a name must mean the same paths under every division: a
    finished shard is kept for what its name says.
    """
    starts = range(0, config.num_paths, config.paths_per_shard)
    parts = [range(start, min(start + config.paths_per_shard, config.num_paths)) for start in starts]
    return {f"paths-{part.start:07d}-{part[-1]:07d}": part for part in parts}


def asked_of_paths(teacher: str | Path, guidance_range: Sequence[float], grid: Any) -> dict[str, Any]:
    """Return the part of an identity that a run must share; `grid` has num_intervals, shift and last."""
    return {
        "teacher": teacher_digest(teacher),
        "guidance_range": [float(w) for w in guidance_range],
        "solver": "euler",
        "grid": {"num_intervals": grid.num_intervals, "shift": float(grid.shift), "last": float(grid.last)},
        "schedule": read_schedule(teacher),
    }


@dataclass(frozen=True)
class Told:
    """What a recording actor is told."""

    config: RecordConfig
    latents: str
    folder: str
    identity: Mapping[str, Any]


class Recorder:
    """One teacher on one device."""

    def __init__(self, told: Told, device: str | torch.device = "cpu"):
        """Load the teacher; open the latents for their captions and shapes."""
        self.told, self.device = told, torch.device(device)
        self.latents = LatentStore(told.latents)
        self.teacher = load_whole_teacher(told.config.teacher).requires_grad_(False).to(self.device)
        self.null_text = null_of(self.latents).to(self.device)
        self.schedule = schedule_from_dict(told.identity["schedule"])
        grid = told.config.grid
        self.grid = TimeGrid(grid.num_intervals, shift=grid.shift, last=grid.last)

    @torch.no_grad()
    def record(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of paths by number; each depends on its number alone, not on the batch."""
        config, index = self.told.config, torch.tensor(numbers)
        rows = self.latents.rows([n % len(self.latents) for n in numbers])
        text = torch.from_numpy(np.stack([row.text for row in rows])).to(self.device)
        low, high = config.guidance_range
        scales = low + (high - low) * draws.uniform(config.seed, index, "recorded guidance")
        by = guide_teacher_by(self.teacher, self.null_text)
        x = draws.noise(config.seed, index, "recorded noise", rows[0].latents.shape).to(self.device)
        states = [x]
        for k in range(config.grid.num_intervals):
            t, r = (time.expand(len(index)) for time in self.grid.interval(torch.tensor([k])))
            x = euler(self.schedule, lambda x, t, text: by(x, t, text, scales), x, t, r, text)
            states.append(x)
        kept = [state.cpu().numpy().astype(config.dtype) for state in states]
        return [
            {
                "sample_id": fingerprint([n, self.told.identity]),
                "caption": row.caption,
                "guidance_scale": float(scales[i]),
                **tensor_columns("text", row.text),
                **{
                    key: v
                    for k, x in enumerate(kept)
                    for key, v in tensor_columns(node_column(k), x[i]).items()
                },
            }
            for i, (n, row) in enumerate(zip(numbers, rows, strict=True))
        ]

    def commit(self, name: str, order: int, numbers: range) -> Manifest:
        """Record a shard and write it."""
        size = self.told.config.batch_size
        parts = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        rows = [row for part in parts for row in self.record(part)]
        table = pa.Table.from_pylist(rows, schema=schema(len(self.grid.nodes)))
        digest = fingerprint(
            [
                [row["sample_id"], fingerprint(row[f"{node_column(self.grid.num_intervals)}_bytes"].hex())]
                for row in rows
            ]
        )
        about = {"order": order, "rows_per_group": 1, "rows_digest": digest}
        folder, identity = self.told.folder, self.told.identity
        return write_table(folder, name, table, identity, kind=TrajectoryStore.kind, about=about)
