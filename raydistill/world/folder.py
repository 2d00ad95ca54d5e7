"""What a user's folder holds: media files, their captions, and what must not be touched."""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.errors import InvalidValue, MediaError, MissingArtifact

SUFFIXES = {
    "videos": frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"}),
    "images": frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}),
}
"""File names that count as input, by kind of source; case does not matter."""

CAPTION_KEYS = ("caption", "text")
FILE_KEYS = ("file", "file_name", "path", "video", "image")
CAPTION_SUFFIXES = (".json", ".txt")
MAX_CAPTION_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """One input file, as listed."""

    uri: str
    """Path relative to the source folder, with '/'."""
    bytes: int
    mtime_ns: int
    refused: str = ""
    """Why the file is not even opened; empty if it may be."""


def list_sources(root: str | Path, kind: str) -> tuple[list[Source], int]:
    """Return the media files below a folder in name order, and how many files are neither those nor captions.

    Links are not followed and, like FIFOs and devices, are listed as refused: a link may lead out of the
    folder, and opening a FIFO blocks. Raises MissingArtifact if there is nothing to prepare.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise MissingArtifact(f"source.path: no folder at {folder.absolute()}")
    found, passed_over = [], list[Path]()
    for at, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(at, name)
            if name.startswith(".") or Path(name).suffix.lower() not in SUFFIXES[kind]:
                passed_over.append(path)
                continue
            found.append(describe_source(path, path.relative_to(folder).as_posix()))
    named = {folder / one.uri for one in found} | {(folder / one.uri).with_suffix("") for one in found}
    captions = sum(path.suffix in CAPTION_SUFFIXES and path.with_suffix("") in named for path in passed_over)
    others = len(passed_over) - captions
    if not found:
        suffixes = " ".join(sorted(SUFFIXES[kind]))
        raise MissingArtifact(
            f"source.path: no {kind} below {folder.absolute()}, {others} other files. Looked for {suffixes}: "
            "put files there, or set source.kind and source.path."
        )
    return sorted(found, key=lambda source: source.uri), others


def describe_source(path: Path, uri: str) -> Source:
    """Return what a listing shows of a file, without opening it."""
    status = os.lstat(path)
    refused = "" if stat.S_ISREG(status.st_mode) else f"not a plain file ({stat.filemode(status.st_mode)[0]})"
    readable = os.fsencode(uri).decode("utf-8", "backslashreplace")
    if readable != uri:
        refused = refused or "its name is not UTF-8: rename it"
    return Source(readable, status.st_size, status.st_mtime_ns, refused)


def read_caption(path: str | Path) -> str | None:
    """Return the caption in a sidecar of a media file, or None if there is none.

    Looked for beside `clip.mp4`, in this order: clip.json, clip.txt, clip.mp4.json, clip.mp4.txt. JSON holds
    the text under "caption" or "text". Raises MediaError bad_caption if a sidecar is there but cannot be
    used.
    """
    path = Path(path)
    for beside in (
        path.with_suffix(".json"),
        path.with_suffix(".txt"),
        Path(f"{path}.json"),
        Path(f"{path}.txt"),
    ):
        if not beside.exists():
            continue
        if beside.is_symlink() or not beside.is_file() or beside.stat().st_size > MAX_CAPTION_BYTES:
            raise MediaError(
                "bad_caption", f"{beside.name} is no plain file of at most {MAX_CAPTION_BYTES} bytes"
            )
        try:
            text = beside.read_bytes().decode("utf-8-sig")
            caption = _caption_of(json.loads(text)) if beside.suffix == ".json" else text
        except ValueError as failed:
            raise MediaError("bad_caption", f"{beside.name}: {failed}") from failed
        return _tidy(caption)
    return None


def read_captions_file(path: str | Path) -> dict[str, str]:
    """Return {uri: caption} from a JSON-lines file: objects with "file" and "caption" (or "text").

    Raises InvalidValue naming the line.
    """
    captions: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as failed:
        raise InvalidValue("source.captions", str(path), f"a readable UTF-8 file ({failed})") from failed
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name = Path(next(record[key] for key in FILE_KEYS if key in record)).as_posix()
            caption = _tidy(_caption_of(record))
        except (ValueError, TypeError, StopIteration) as failed:
            expected = f'an object with "file" and "caption" in line {number}'
            raise InvalidValue("source.captions", str(path), expected) from failed
        if caption:
            captions[name] = caption
    return captions


def _caption_of(record: Any) -> str:
    """Return the caption in a JSON object. Raises ValueError."""
    if isinstance(record, str):
        return record
    values = [record[key] for key in CAPTION_KEYS if key in record] if isinstance(record, Mapping) else []
    if not values or not isinstance(values[0], str):
        raise ValueError(f"no text under {' or '.join(CAPTION_KEYS)}")
    return values[0]


def _tidy(caption: str) -> str | None:
    """Return a caption in one line, or None if nothing is left."""
    return " ".join(caption.split()) or None


def settle_caption(caption: str | None, policy: str) -> str:
    """Return the caption; '' for none if the policy is "empty".

    Raises MediaError missing_caption, or bad_caption for half of a surrogate pair, which JSON can hold.
    """
    if caption is None and policy != "empty":
        raise MediaError("missing_caption", "no .txt or .json beside it, nothing in the captions file")
    try:
        (caption or "").encode()
    except UnicodeEncodeError as failed:
        raise MediaError("bad_caption", f"the caption is no text: {failed}") from failed
    return caption or ""


def missing_captions_message(uris: Sequence[str]) -> str:
    """Return what to tell a user whose policy is 'error'."""
    shown = ", ".join(uris[:5]) + (", ..." if len(uris) > 5 else "")
    return (
        f"{len(uris)} files have no caption: {shown}. Put a .txt or .json beside each, name a captions file "
        "with source.captions, or choose source.caption_policy=filter or =empty."
    )
