"""Latents on disk, see `raydistill.shards`: their rows, what was left out, which shards need not be done."""

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydistill.artifacts import (
    LATENTS_SCHEMA,
    LATENTS_SCHEMA_VERSION,
    Manifest,
    fingerprint,
    write_atomically,
)
from raydistill.errors import disk_full_explained
from raydistill.latents.tally import LEFT_OUT
from raydistill.shards import tensor_columns, whole_shard, write_table

KIND = "latents"
LIMITED = frozenset({"timeout", "oom", "crash"})
"""Reasons for quarantine that a longer deadline or more memory may remove."""

UNSETTLED = frozenset({"changed"})
"""Reasons that may be gone the next time, whatever the settings."""


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
    """Write a shard of latents and its manifest, see `shards.write_table`; return that manifest."""
    whole = [{field: row.get(field) for field in LATENTS_SCHEMA.names} for row in rows]
    return write_table(
        folder,
        name,
        pa.Table.from_pylist(whole, schema=LATENTS_SCHEMA),
        identity,
        kind=KIND,
        about={"order": order, "rows_per_group": rows_per_group, "rows_digest": rows_digest(whole)},
        facts=facts,
    )


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
    manifest = whole_shard(folder, name, identity)
    again = manifest is not None and limits is not None and _may_fare_better(manifest.facts, limits)
    return None if again else manifest


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
