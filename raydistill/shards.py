"""Rows on disk: one Parquet file and one manifest per shard, one manifest over all.

A shard's manifest is written after its file, the artifact's after all shards. Whatever was interrupted leaves
files that no manifest names, and those do not count.
"""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.artifacts import (
    LATENTS_POINTER,
    Manifest,
    commit_file,
    file_entry,
    fingerprint,
    footer_sha256,
    write_json,
)
from raydistill.errors import ArtifactError, CorruptArtifact, disk_full_explained


def tensor_columns(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return a tensor as its bytes/shape/dtype triplet, little-endian, C order."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return {
        f"{name}_bytes": values.tobytes(),
        f"{name}_shape": list(values.shape),
        f"{name}_dtype": str(values.dtype),
    }


def write_table(
    folder: str | Path,
    name: str,
    table: pa.Table,
    identity: Mapping[str, Any],
    *,
    kind: str,
    about: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `<name>.parquet`, read it back, then write `<name>.manifest.json`; return that manifest.

    `kind` is the artifact's; `about` goes into the file's entry and holds `order`, `rows_per_group` and
    `rows_digest`. Raises PrepareError if the disk is full, CorruptArtifact if the file reads back
    differently; in both cases no manifest is left and the next run computes the shard again.
    """
    folder = Path(folder)
    target, record = folder / f"{name}.parquet", folder / f"{name}.manifest.json"
    beside = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    with disk_full_explained(target), _removed_after(beside):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        _write(beside, table, identity, about["rows_per_group"])
        _require_readable(beside, table)
        commit_file(beside, target)
        entry = {
            **file_entry(target),
            **about,
            "rows": table.num_rows,
            "footer_sha256": footer_sha256(target),
        }
        manifest = Manifest(
            kind=f"{kind}-shard", identity=identity, files={target.name: entry}, facts=facts or {}
        )
        manifest.write(record)
    return manifest


def whole_shard(folder: str | Path, name: str, identity: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest of a shard that is whole and made by the same identity, else None."""
    try:
        manifest = Manifest.read(Path(folder) / f"{name}.manifest.json")
        manifest.verify(folder, contents=False)
    except ArtifactError:
        return None
    return manifest if manifest.fingerprint == fingerprint(identity) else None


def write_artifact(
    folder: str | Path,
    shards: Sequence[Manifest],
    identity: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    *,
    kind: str = "latents",
) -> Manifest:
    """Write the manifest over all shards, in their order: from here on the artifact exists."""
    files: dict[str, Mapping[str, Any]] = {}
    for order, shard in enumerate(shards):
        files.update({name: {**entry, "order": order} for name, entry in shard.files.items()})
    manifest = Manifest(kind=kind, identity=identity, files=files, facts=facts or {})
    manifest.write(folder)
    return manifest


def point_to(output: str | Path, folder: str, fingerprint_: str, pointer: str = LATENTS_POINTER) -> None:
    """Let `output` stand for the artifact in its subfolder, so that the next job needs no fingerprint."""
    write_json(Path(output) / pointer, {"folder": folder, "fingerprint": fingerprint_})


@contextmanager
def _removed_after(path: Path) -> Iterator[None]:
    """Leave no temporary file, whatever happens."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, table: pa.Table, identity: Mapping[str, Any], rows_per_group: int) -> None:
    """Write and sync a Parquet file with page checksums and the fingerprint in its footer."""
    table = table.replace_schema_metadata({"fingerprint": fingerprint(identity)})
    with open(path, "wb") as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=rows_per_group,
            use_dictionary=False,
            compression="none",  # latents do not compress
            write_page_checksum=True,
            write_statistics=False,
        )
        stream.flush()
        os.fsync(stream.fileno())


def _require_readable(path: Path, table: pa.Table) -> None:
    """Read a file back with its checksums and compare with what was meant."""
    try:
        found = pq.ParquetFile(path, page_checksum_verification=True).read(use_threads=False)
    except (OSError, pa.ArrowException) as broken:
        raise CorruptArtifact(f"{path} cannot be read back: {broken}") from broken
    if not found.equals(table):
        raise CorruptArtifact(f"{path} reads back differently from what was written")
