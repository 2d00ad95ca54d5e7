"""What is kept of each sampler's run, so that a second run of the evaluation does only what is missing.

One folder per sampler, named by a fingerprint of everything that shapes its numbers: weights, plan, captions,
seeds and the source of the code that computes them. A folder whose bytes are not what was written is computed
again.
"""

import ast
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from raydistill.artifacts import Manifest, file_entry, fingerprint, write_atomically
from raydistill.errors import ArtifactError, CorruptArtifact

KIND = "evaluation-record"
TENSORS = "record.safetensors"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One sampler on all captions."""

    latents: Float[np.ndarray, "n c f h w"]
    features: Float[np.ndarray, "n d"]
    values: Mapping[str, Float[np.ndarray, " n"]]
    """Measure -> figure per clip."""
    passes: int
    """Network passes per clip; a guided teacher step is two."""
    seconds_per_clip: float
    """Sampling alone, at the batch size of the run."""


class RecordStore:
    """Records below one folder."""

    def __init__(self, folder: str | Path):
        """Nothing is made before the first `save`."""
        self.folder = Path(folder)

    def place(self, name: str, identity: Mapping[str, Any]) -> Path:
        """Folder of a record: the name it was first saved under, and the fingerprint, which alone counts."""
        mark = fingerprint(identity)[:16]
        return next(self.folder.glob(f"*{mark}"), self.folder / f"{name}-{mark}")

    def load(self, name: str, identity: Mapping[str, Any]) -> Record | None:
        """Return the record, or None if it was never finished or is damaged (which is logged)."""
        place = self.place(name, identity)
        if not place.is_dir():
            return None
        try:
            return _read(place, identity)
        except ArtifactError as broken:
            log.warning("%s is computed again: %s", name, broken)
            return None

    def save(self, name: str, identity: Mapping[str, Any], record: Record) -> None:
        """Write tensors, then the manifest that makes them count."""
        place = self.place(name, identity)
        (place / "manifest.json").unlink(missing_ok=True)  # a damaged record must not vouch for new tensors
        tensors = {"latents": record.latents, "features": record.features}
        tensors |= {
            f"values/{key}": np.asarray(value, dtype=np.float64) for key, value in record.values.items()
        }
        write_atomically(place / TENSORS, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
        facts = {"passes": record.passes, "seconds_per_clip": record.seconds_per_clip}
        Manifest(
            kind=KIND, identity=identity, files={TENSORS: file_entry(place / TENSORS)}, facts=facts
        ).write(place)


def source_digest(paths: Iterable[Path]) -> str:
    """Digest of what Python files do: comments, docstrings and layout do not matter."""
    return fingerprint(
        [[p.name, ast.dump(_without_docs(p.read_text(encoding="utf-8")))] for p in sorted(paths)]
    )


def _without_docs(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            texts = [
                one for one in node.body if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            ]
            node.body = [one for one in node.body if one not in texts]
    return tree


def _read(place: Path, identity: Mapping[str, Any]) -> Record:
    manifest = Manifest.read(place)
    manifest.verify(place)
    if manifest.kind != KIND or manifest.fingerprint != fingerprint(identity):
        raise CorruptArtifact(f"{place} is the record of another sampler")
    try:
        tensors = load_file(place / TENSORS)
    except SafetensorError as broken:
        raise CorruptArtifact(f"{place / TENSORS}: {broken}") from broken
    values = {
        key.removeprefix("values/"): value for key, value in tensors.items() if key.startswith("values/")
    }
    return Record(tensors["latents"], tensors["features"], values, **manifest.facts)
