"""What a stage leaves on disk: columns, manifest, fingerprint, verification.

An artifact is a folder whose `manifest.json` was written last. It says what shaped the artifact, which files
belong to it, and how many bytes with which sha256 each has. Readers follow manifests, never directory
listings: a file that no manifest names does not exist.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeArgument=false, reportMissingTypeStubs=false
# pyarrow comes without types

import bisect
import hashlib
import itertools
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.errors import CorruptArtifact, MissingArtifact, StaleArtifact, storage_explained

MANIFEST = "manifest.json"
LATENTS_SCHEMA_VERSION = 1
LATENTS_POINTER = "latents.json"

TENSOR = {"bytes": pa.large_binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
LATENTS_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("sample_id", "caption", "source_uri", "source_sha256", "lane")]
    + [(f"{name}_{part}", kind) for name in ("latents", "text") for part, kind in TENSOR.items()]
    + [(name, pa.float64()) for name in ("start_s", "end_s", "fps_src")]
    + [("schema_version", pa.int32())]
)
"""Tensors are bytes + shape + dtype: readable, and safe to read, without Ray or torch."""
ROW_COLUMNS = ["caption", "sample_id", *(f"{name}_{part}" for name in ("latents", "text") for part in TENSOR)]
DTYPES = ("float32", "float16", "float64")


def canonical_json(obj: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII. Raises ValueError, TypeError."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fingerprint(obj: Any) -> str:
    """Return the sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_digest(folder: str | Path) -> str:
    """Return one sha256 over the names and contents of all files below a folder, or of one file.

    Where the folder lies, times and permissions do not matter; names that begin with a dot are left out.
    Raises MissingArtifact if there is no such path or no file in it.
    """
    return fingerprint(tree_files(folder))


def tree_files(folder: str | Path) -> dict[str, str]:
    """Return {relative path: sha256} of every file below a folder, or of one file; see `tree_digest`."""
    root = Path(folder)
    if root.is_file():
        return {root.name: file_sha256(root)}
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    names = [n for n in names if not any(part.startswith((".", "__pycache__")) for part in n.parts)]
    if not names:
        raise MissingArtifact(f"{root}: no files there")
    return {n.as_posix(): file_sha256(root / n) for n in names}


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file whose name shows either the old bytes or all of the new ones, also after a power cut."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(beside, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        commit_file(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def commit_file(beside: str | Path, target: str | Path) -> None:
    """Give a written and synced file its final name, durably."""
    os.replace(beside, target)
    folder = os.open(Path(target).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON atomically (see `write_atomically`), indented, keys sorted."""
    write_atomically(path, json.dumps(obj, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n")


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Return one line per leaf in which two JSON values differ, 'models.codec.digest: 1 != 2'."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        pairs = ((k, ours.get(k, "(absent)"), theirs.get(k, "(absent)")) for k in sorted({*ours, *theirs}))
        return [line for k, a, b in pairs for line in differences(a, b, f"{at}.{k}".lstrip("."))]
    return [] if canonical_json(ours) == canonical_json(theirs) else [f"{at}: {ours!r} != {theirs!r}"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is and of which files it consists. Written last; guarded by its own checksum."""

    kind: str
    """What it is, e.g. 'latents'."""
    identity: Mapping[str, Any]
    """Everything that shaped the contents: settings, model contents, versions."""
    files: Mapping[str, Mapping[str, Any]]
    """Relative name -> {'bytes': int, 'sha256': hex, ...}."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known: counts, input lists. Not part of the fingerprint."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of the identity: equal settings, models and versions give equal fingerprints."""
        return fingerprint(self.identity)

    def write(self, path: str | Path) -> None:
        """Write to a file, or as `manifest.json` into a folder, atomically. The last act of a writer."""
        body = asdict(self)
        write_json(self.locate(path), {**body, "checksum": fingerprint(body)})

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read a manifest file or a folder's. Raises MissingArtifact; CorruptArtifact if a byte differs."""
        where = cls.locate(path)
        try:
            body = json.loads(where.read_bytes())
            checksum = body.pop("checksum")
        except FileNotFoundError as missing:
            why = "no artifact, or one that is not finished" if where.parent.is_dir() else "no such folder"
            raise MissingArtifact(f"{where.absolute()} is not there: {why}") from missing
        except (ValueError, AttributeError, KeyError) as broken:
            raise CorruptArtifact(f"{where} is not a whole manifest: {broken!r}") from broken
        if checksum != fingerprint(body):
            raise CorruptArtifact(f"{where} does not match its own checksum")
        body["files"] = {contained(name): entry for name, entry in body["files"].items()}
        return cls(**body)

    @staticmethod
    def locate(path: str | Path) -> Path:
        """Return the manifest file meant by a folder or a file name."""
        return Path(path) if Path(path).suffix == ".json" else Path(path) / MANIFEST

    def verify(self, folder: str | Path, *, contents: bool = True) -> None:
        """Check that every file is there with its size and, with `contents`, its sha256.

        Raises MissingArtifact, CorruptArtifact.
        """
        for name, entry in self.files.items():
            path, promised = Path(folder) / name, entry["bytes"]
            if not path.is_file():
                raise MissingArtifact(f"{path} is gone, though the manifest names it")
            if path.stat().st_size != promised:
                raise CorruptArtifact(f"{path} has {path.stat().st_size} bytes, the manifest says {promised}")
            if contents and file_sha256(path) != entry["sha256"]:
                raise CorruptArtifact(f"{path} differs from what was written (sha256)")


def contained(name: str) -> str:
    """Return a relative name. Raises CorruptArtifact if it leads out of the folder of whoever names it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CorruptArtifact(f"an artifact names '{name}', which is not inside its own folder")
    return name


def file_entry(path: str | Path) -> dict[str, Any]:
    """Return the manifest's entry for a file."""
    return {"bytes": os.stat(path).st_size, "sha256": file_sha256(path)}


@dataclass(frozen=True)
class LatentRow:
    """One prepared clip."""

    latents: np.ndarray
    """Float32 (c, f, h, w), normalised as the teacher expects."""
    text: np.ndarray
    """Float32 (l, d)."""
    caption: str
    sample_id: str


class LatentStore:
    """Rows of a latents artifact by number, 0 .. len - 1, in an order fixed by the artifact.

    Files stay open and mapped, only the needed columns of one small row group are read, and the checksum of
    every page is verified. May be pickled; each copy opens its own files. Not for several threads at once.

    `path` is the folder with `manifest.json`, or one whose `latents.json` points to it. `expect` is a part of
    the identity that must agree, e.g. {"models": {"codec": {"digest": "..."}}}.
    Raises MissingArtifact, CorruptArtifact, StaleArtifact.
    """

    kind, pointer = "latents", LATENTS_POINTER

    def __init__(self, path: str | Path, expect: Mapping[str, Any] | None = None):
        self.folder = resolve_pointer(path, self.pointer)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.kind != self.kind:
            raise StaleArtifact(f"{self.folder} holds {self.manifest.kind}, not {self.kind}")
        require_identity(self.manifest.identity, expect or {}, self.folder)
        self.manifest.verify(self.folder, contents=False)
        self._names = sorted(self.manifest.files, key=lambda name: self.manifest.files[name]["order"])
        self._ends = list(itertools.accumulate(self.manifest.files[name]["rows"] for name in self._names))
        self._open: dict[int, pq.ParquetFile] = {}

    def __reduce__(self):
        """Pickle as the path alone: handles belong to one process."""
        return type(self), (str(self.folder),)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        """The sha256 of what shaped the rows and of the rows themselves, in their order."""
        contents = [self.manifest.files[name]["rows_digest"] for name in self._names]
        return fingerprint({"made_by": self.manifest.fingerprint, "rows": contents})

    def require_codec(self, digest: str) -> None:
        """Refuse latents that another codec encoded; `digest` is `tree_digest(codec folder)`."""
        require_identity(self.manifest.identity, {"models": {"codec": {"digest": digest}}}, self.folder)

    def row(self, i: int) -> LatentRow:
        """Return row `i`. Raises IndexError; CorruptArtifact for wrong bytes, else another ArtifactError."""
        return self.rows([i])[0]

    def rows(self, indices: Sequence[int]) -> list[LatentRow]:
        """Return several rows in the order asked for; a row group they share is read once."""
        places = [self._place(int(i)) for i in indices]
        groups = {place: self._read(*place, ROW_COLUMNS) for place in dict.fromkeys(p[:2] for p in places)}
        return [self._decode(groups[shard, group], at) for shard, group, at in places]

    def __iter__(self) -> Iterator[LatentRow]:
        for start in range(0, len(self), 64):
            yield from self.rows(range(start, min(start + 64, len(self))))

    def column(self, name: str) -> list[Any]:
        """Return one column, e.g. 'caption' or 'sample_id', of all rows in order, without reading tensors."""
        tables = (self._read(shard, None, [name]) for shard in range(len(self._names)))
        return [value for table in tables for value in table.column(name).to_pylist()]

    def verify(self) -> None:
        """Read every byte and compare with the manifest. Raises MissingArtifact, CorruptArtifact."""
        self.manifest.verify(self.folder, contents=True)

    def _place(self, i: int) -> tuple[int, int, int]:
        """Return (shard, row group, row within the group)."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        within = i - (self._ends[shard - 1] if shard else 0)
        per_group = self.manifest.files[self._names[shard]]["rows_per_group"]
        return shard, within // per_group, within % per_group

    def _file(self, shard: int) -> pq.ParquetFile:
        """Return the open shard; its footer has no checksum of its own and is compared with the manifest."""
        if shard not in self._open:
            name = self._names[shard]
            path = self.folder / name
            with storage_explained(path, (pa.ArrowException,)):
                if footer_sha256(path) != self.manifest.files[name]["footer_sha256"]:
                    raise CorruptArtifact(f"{path}: its footer differs from what was written")
                self._open[shard] = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        return self._open[shard]

    def _read(self, shard: int, group: int | None, columns: list[str]) -> pa.Table:
        """Read columns of one row group, or of the whole shard."""
        file = self._file(shard)
        with storage_explained(self.folder / self._names[shard], (pa.ArrowException,)):
            if group is None:
                return file.read(columns=columns, use_threads=False)
            return file.read_row_group(group, columns=columns, use_threads=False)

    def _decode(self, table: pa.Table, at: int) -> LatentRow:
        """Build a row from a group's table."""
        latents, text = (read_tensor(table, name, at) for name in ("latents", "text"))
        caption, sample_id = (table.column(name)[at].as_py() for name in ("caption", "sample_id"))
        return LatentRow(latents, text, caption, sample_id)


def read_tensor(table: pa.Table, name: str, at: int) -> np.ndarray:
    """Return the tensor of a bytes/shape/dtype triplet as a new float32 array. Raises CorruptArtifact."""
    data = table.column(f"{name}_bytes")[at].as_buffer()
    shape, dtype = (table.column(f"{name}_{part}")[at].as_py() for part in ("shape", "dtype"))
    if dtype not in DTYPES or math.prod(shape) * np.dtype(dtype).itemsize != data.size:
        raise CorruptArtifact(f"{name}: {data.size} bytes cannot be {shape} of {dtype}")
    values = np.frombuffer(data, dtype).reshape(shape)
    return values.astype(np.float32)  # always a copy: torch warns at read-only memory


def footer_sha256(path: str | Path) -> str:
    """Return the sha256 of a Parquet footer: schema and places of all pages. Raises CorruptArtifact."""
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
        length = int.from_bytes(tail[:4], "little") + 8
        if tail[4:] != b"PAR1" or length > size:
            raise CorruptArtifact(f"{path} does not end like a Parquet file")
        stream.seek(size - length)
        return hashlib.sha256(stream.read(length)).hexdigest()


def resolve_pointer(path: str | Path, pointer: str) -> Path:
    """Return the artifact's folder: `path`, or the one its pointer file names. Raises CorruptArtifact."""
    folder = Path(path)
    if (folder / MANIFEST).is_file() or not (folder / pointer).is_file():
        return folder
    try:
        return folder / contained(json.loads((folder / pointer).read_bytes())["folder"])
    except (ValueError, KeyError, TypeError) as broken:
        raise CorruptArtifact(f"{folder / pointer}: {broken!r}") from broken


def require_identity(identity: Mapping[str, Any], expect: Mapping[str, Any], where: str | Path) -> None:
    """Compare the part of an identity that `expect` names. Raises StaleArtifact, listing every difference."""
    if wrong := differences(_part(identity, expect), expect):
        listing = "\n  ".join(wrong)
        raise StaleArtifact(f"{where} was made otherwise than asked for (found != expected):\n  {listing}")


def _part(whole: Any, like: Any) -> Any:
    """Return of a JSON value only the keys that another one has."""
    if not (isinstance(whole, Mapping) and isinstance(like, Mapping)):
        return whole
    return {k: _part(whole[k], like[k]) for k in like if k in whole}
