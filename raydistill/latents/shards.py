"""Latents on disk: one Parquet file and one manifest per shard, one manifest over all.

A shard's manifest is written after its file, the artifact's after all shards. Whatever was interrupted leaves
files that no manifest names, and those do not count.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.artifacts import (
    LATENTS_POINTER,
    LATENTS_SCHEMA,
    LATENTS_SCHEMA_VERSION,
    Manifest,
    commit_file,
    file_entry,
    fingerprint,
    footer_sha256,
    write_atomically,
    write_json,
)
from raydistill.errors import ArtifactError, CorruptArtifact, disk_full_explained
from raydistill.latents.tally import LEFT_OUT

LIMITED = frozenset({"timeout", "oom", "crash"})
"""Reasons for quarantine that a longer deadline or more memory may remove."""

UNSETTLED = frozenset({"changed"})
"""Reasons that may be gone the next time, whatever the settings."""


def tensor_columns(name: str, values: np.ndarray) -> dict[str, Any]:
    """Return a tensor as its bytes/shape/dtype triplet, little-endian, C order."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return {
        f"{name}_bytes": values.tobytes(),
        f"{name}_shape": list(values.shape),
        f"{name}_dtype": str(values.dtype),
    }


def latent_row(
    latents: np.ndarray, text: np.ndarray, caption: str, sample_id: str, **more: Any
) -> dict[str, Any]:
    """Return one row of the schema; `more` holds the remaining columns, empty where not given."""
    row: dict[str, Any] = {
        "sample_id": sample_id,
        "caption": caption,
        "schema_version": LATENTS_SCHEMA_VERSION,
    }
    return {
        **row,
        **tensor_columns("latents", latents),
        **tensor_columns("text", text),
        "lane": "video",
        **more,
    }


def write_shard(
    folder: str | Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    *,
    order: int = 0,
    rows_per_group: int = 4,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `<name>.parquet`, read it back, then write `<name>.manifest.json`; return that manifest.

    Raises PrepareError if the disk is full, CorruptArtifact if the file reads back differently; in both cases
    no manifest is left and the next run computes the shard again.
    """
    folder = Path(folder)
    target, record = folder / f"{name}.parquet", folder / f"{name}.manifest.json"
    beside = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    whole = [{field: row.get(field) for field in LATENTS_SCHEMA.names} for row in rows]
    table = pa.Table.from_pylist(whole, schema=LATENTS_SCHEMA)
    with disk_full_explained(target), _removed_after(beside):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        _write_table(beside, table, identity, rows_per_group)
        _require_readable(beside, table)
        commit_file(beside, target)
        entry = {
            **file_entry(target),
            "order": order,
            "rows": len(rows),
            "rows_per_group": rows_per_group,
            "rows_digest": rows_digest(whole),
            "footer_sha256": footer_sha256(target),
        }
        manifest = Manifest(
            kind="latents-shard", identity=identity, files={target.name: entry}, facts=facts or {}
        )
        manifest.write(record)
    return manifest


def write_quarantine(folder: str | Path, name: str, bad: Sequence[Mapping[str, Any]]) -> None:
    """Write `quarantine/<name>.jsonl`, one line per bad file with its reason; no file if there is none."""
    target = Path(folder) / "quarantine" / f"{name}.jsonl"
    if not bad:
        target.unlink(missing_ok=True)
        return
    lines = [json.dumps(about, sort_keys=True) for about in bad]
    with disk_full_explained(target):
        write_atomically(target, ("\n".join(lines) + "\n").encode())


def write_left_out(folder: str | Path, files: Iterable[tuple[str, str, str]]) -> None:
    """Write `left_out.jsonl`: every file that gave no clip, its outcome and reason code, in name order."""
    target = Path(folder) / LEFT_OUT
    lines = [
        json.dumps({"uri": uri, "outcome": outcome, "reason": reason})
        for uri, outcome, reason in sorted(files)
    ]
    with disk_full_explained(target):
        write_atomically(target, "".join(line + "\n" for line in lines).encode())


def rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the sha256 over everything in the rows that training sees, tensors by their bytes."""
    seen = [(r["sample_id"], r["caption"], r["lane"], r["latents_shape"], r["text_shape"]) for r in rows]
    tensors = [fingerprint([r["latents_bytes"].hex(), r["text_bytes"].hex()]) for r in rows]
    return fingerprint([seen, tensors])


def finished_shard(
    folder: str | Path, name: str, identity: Mapping[str, Any], limits: Mapping[str, float] | None = None
) -> Manifest | None:
    """Return the manifest of a shard that is whole and made by the same identity, else None.

    With `limits` (as in the facts' `tried_with`) a shard does not count either if a file of it may fare
    better under them.
    """
    try:
        manifest = Manifest.read(Path(folder) / f"{name}.manifest.json")
        manifest.verify(folder, contents=False)
    except ArtifactError:
        return None
    again = limits is not None and _may_fare_better(manifest.facts, limits)
    return manifest if manifest.fingerprint == fingerprint(identity) and not again else None


def _may_fare_better(facts: Mapping[str, Any], limits: Mapping[str, float]) -> bool:
    """Whether a quarantined file deserves another try: it changed meanwhile, or a limit was raised."""
    reasons = {reason for *_, reason in facts.get("files", ())}
    tried = facts.get("tried_with", {})
    raised = any(limit > tried.get(name, 0.0) for name, limit in limits.items())
    return bool(reasons & UNSETTLED or (raised and reasons & LIMITED))


def adopt_shard(
    folder: str | Path,
    name: str,
    identity: Mapping[str, Any],
    limits: Mapping[str, float],
    donors: Iterable[Path],
) -> Manifest | None:
    """Share a shard that another folder has finished, by hard links; return its manifest, None if none has.

    Nobody writes into a file that has its final name, so neither folder can harm the other. None also where
    the file system knows no links.
    """
    found = ((donor, finished_shard(donor, name, identity, limits)) for donor in donors)
    donor, manifest = next(((d, m) for d, m in found if m), (None, None))
    if donor is None:
        return None
    folder = Path(folder)
    (folder / "quarantine").mkdir(parents=True, exist_ok=True)
    for part in (f"{name}.parquet", f"quarantine/{name}.jsonl", f"{name}.manifest.json"):  # manifest last
        (folder / part).unlink(missing_ok=True)
        if not (donor / part).exists():
            continue  # a shard without bad files has no list
        try:
            os.link(donor / part, folder / part)
        except OSError as failed:
            if failed.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
                raise
            return None
    return manifest


def write_artifact(
    folder: str | Path,
    shards: Sequence[Manifest],
    identity: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the manifest over all shards, in their order: from here on the artifact exists."""
    files: dict[str, Mapping[str, Any]] = {}
    for order, shard in enumerate(shards):
        files.update({name: {**entry, "order": order} for name, entry in shard.files.items()})
    manifest = Manifest(kind="latents", identity=identity, files=files, facts=facts or {})
    manifest.write(folder)
    return manifest


def point_to(output: str | Path, folder: str, fingerprint_: str) -> None:
    """Let `output` stand for the artifact in its subfolder, so that the next job needs no fingerprint."""
    write_json(Path(output) / LATENTS_POINTER, {"folder": folder, "fingerprint": fingerprint_})


@contextmanager
def _removed_after(path: Path) -> Iterator[None]:
    """Leave no temporary file, whatever happens."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _write_table(path: Path, table: pa.Table, identity: Mapping[str, Any], rows_per_group: int) -> None:
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
