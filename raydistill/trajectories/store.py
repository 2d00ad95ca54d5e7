"""Paths of a teacher, recorded ahead: an artifact like that of latents, with a column for every node."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raydistill.artifacts import TENSOR, LatentRow, LatentStore, read_tensor, require_identity
from raydistill.errors import CorruptArtifact

POINTER = "trajectories.json"
SCHEMA_VERSION = 1


def node_column(k: int) -> str:
    """Name of the tensor that holds the states at node k."""
    return f"node_{k:03d}"


def schema(num_nodes: int) -> pa.Schema:
    """Columns of an artifact: two neighbouring nodes are read without the others."""
    tensors = ["text", *(node_column(k) for k in range(num_nodes))]
    return pa.schema(
        [(name, pa.string()) for name in ("sample_id", "caption")]
        + [(f"{name}_{part}", kind) for name in tensors for part, kind in TENSOR.items()]
        + [("guidance_scale", pa.float64())]
    )


class TrajectoryStore(LatentStore):
    """Recorded paths by number; see `LatentStore`, whose guarantees it shares.

    Raises MissingArtifact, CorruptArtifact, StaleArtifact.
    """

    kind, pointer = "trajectories", POINTER

    @property
    def num_nodes(self) -> int:
        """States of a path: the teacher's steps and 1."""
        return int(self.manifest.identity["grid"]["num_intervals"]) + 1

    def row(self, i: int) -> LatentRow:
        """Return the end of path i: the teacher's own sample."""
        found, end = self.pair(i, self.num_nodes - 2)
        return replace(found, latents=end)

    def pair(self, i: int, k: int) -> tuple[LatentRow, np.ndarray]:
        """Return path i with its state x_t at node k as latents, and x_r, its state at node k + 1.

        Raises IndexError; CorruptArtifact for wrong bytes, else another ArtifactError.
        """
        if not 0 <= k < self.num_nodes - 1:
            raise IndexError(f"interval {k} of {self.num_nodes - 1}")
        shard, group, at = self._place(i)
        names = ["text", node_column(k), node_column(k + 1)]
        columns = [f"{name}_{part}" for name in names for part in TENSOR]
        table = self._read(shard, group, ["caption", "sample_id", *columns])
        text, x_t, x_r = (read_tensor(table, name, at) for name in names)
        if x_t.shape != x_r.shape:
            raise CorruptArtifact(f"{self.folder}: states of path {i} have shapes {x_t.shape}, {x_r.shape}")
        caption, sample_id = (table.column(name)[at].as_py() for name in ("caption", "sample_id"))
        return LatentRow(x_t, text, caption, sample_id), x_r

    def rows(self, indices: Sequence[int]) -> list[LatentRow]:
        """Return the ends of several paths."""
        return [self.row(int(i)) for i in indices]

    def require_run(self, asked: dict[str, Any]) -> None:
        """Refuse paths of another teacher, guidance, solver, grid or schedule than a run asks for.

        `asked` holds any of `teacher` (a digest), `guidance_range`, `solver`, `grid` and `schedule`. Raises
        StaleArtifact, naming every difference.
        """
        require_identity(self.manifest.identity, asked, self.folder)
