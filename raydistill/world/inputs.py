"""Input files with their content hash and caption, and how they are dealt to shards."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raydistill.artifacts import file_sha256, fingerprint
from raydistill.errors import MediaError
from raydistill.world.folder import Source, describe_source, read_caption, settle_caption


@dataclass(frozen=True)
class Input:
    """A listed file after a first look; with a reason if that already settled its fate."""

    uri: str
    bytes: int
    mtime_ns: int
    sha256: str = ""
    caption: str = ""
    reason: str = ""
    """Reason code of a file that is not to be decoded."""
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Shard:
    """Files that are prepared and committed together."""

    name: str
    """From the first file's hash and a digest of all inputs: other inputs make another name."""
    order: int
    inputs: tuple[Input, ...]


def examine(
    root: str | Path,
    source: Source,
    *,
    policy: str,
    captions: Mapping[str, str] | None = None,
    sha256: str = "",
) -> Input:
    """Look at one file: hash it, unless its hash is known, and find its caption.

    `captions` replaces the sidecars; `policy` is for files without caption. Never raises for a bad file.
    """
    found = Input(source.uri, source.bytes, source.mtime_ns, sha256)
    if source.refused:
        return replace(found, reason="policy", message=source.refused)
    if not source.bytes:  # before hashing, or all but the first would pass for duplicates
        return replace(found, reason="zero_bytes", message="the file is empty")
    path = Path(root, source.uri)
    try:
        found = replace(found, sha256=sha256 or file_sha256(path))
        caption = read_caption(path) if captions is None else captions.get(source.uri)
        return replace(found, caption=settle_caption(caption, policy))
    except OSError as failed:
        return replace(found, reason="unreadable", message=os.strerror(failed.errno or 0))
    except MediaError as bad:
        return replace(found, reason=bad.reason, message=bad.message)


def require_unchanged(root: str | Path, known: Input) -> None:
    """Check that a file is still the one that was hashed. Raises MediaError changed."""
    try:
        now = describe_source(Path(root, known.uri), known.uri)
    except OSError as failed:
        raise MediaError("changed", f"gone since it was listed ({failed.strerror})") from failed
    if now.refused or (now.bytes, now.mtime_ns) != (known.bytes, known.mtime_ns):
        raise MediaError("changed", "written to since it was listed; run again when nothing writes there")


def mark_duplicates(inputs: Iterable[Input]) -> list[Input]:
    """Leave out all but the first, in name order, of the files with equal bytes."""
    first: dict[str, str] = {}
    marked = []
    for found in sorted(inputs, key=lambda i: i.uri):
        twin = first.setdefault(found.sha256, found.uri) if found.sha256 and not found.reason else found.uri
        marked.append(
            found if twin == found.uri else replace(found, reason="duplicate", message=f"same as {twin}")
        )
    return marked


def deal(inputs: Sequence[Input], files_per_shard: int) -> list[Shard]:
    """Deal the files that are to be decoded to shards of at most so many, in content-hash order.

    A shard also ends after a file whose hash says so, one in `files_per_shard`: so one more file changes the
    shard it falls into and perhaps the next, not all that follow.
    """
    ready = sorted((i for i in inputs if not i.reason), key=lambda i: i.sha256)
    shards: list[Shard] = []
    members: list[Input] = []
    for found in ready:
        members.append(found)
        says_so = int(found.sha256[-8:], 16) % files_per_shard == 0
        if says_so or len(members) == files_per_shard or found is ready[-1]:
            digest = inputs_identity(members)["digest"]
            name = f"{members[0].sha256[:8]}-{digest[:12]}"
            shards.append(Shard(name, len(shards), tuple(members)))
            members = []
    return shards


def inputs_identity(inputs: Iterable[Input]) -> dict[str, Any]:
    """Return what stands for files in a fingerprint, in any order: names, contents, captions, refusals."""
    facts = sorted([i.uri, i.sha256, i.caption, i.reason] for i in inputs)
    return {"files": len(facts), "digest": fingerprint(facts)}
