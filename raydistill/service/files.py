"""Artefacts by name, in a local folder or any storage that fsspec knows (s3://...).

Raises ArtifactError for storage that fails, which may be back later, whatever its own errors are called.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raydistill.artifacts import write_atomically
from raydistill.errors import ArtifactError, CorruptArtifact, InvalidValue, MissingArtifact, RaydistillError

CHUNK = 1 << 18


class Files:
    """Whole files, written once under names that the server chooses, below one root."""

    def __init__(self, url: str):
        """Open a folder or an fsspec URL. Raises InvalidValue for a kind of storage that is not installed."""
        try:
            self.system, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidValue("artifacts", url, f"a folder or fsspec URL: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.system, LocalFileSystem)

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if name == ".":
            return self.root
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ArtifactError(f"'{name}' is no name below the artefacts' root")
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a file whole or not at all; returns {"file", "bytes", "sha256"}."""
        path = self._path(name)
        with storage():
            if self.is_local:
                write_atomically(path, data)
            else:  # an object appears when its last byte is there
                self.system.pipe_file(path, data)
        return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """Read a file that `write` made. Raises CorruptArtifact, MissingArtifact."""
        with storage():
            data = self.system.cat_file(self._path(entry["file"]))
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptArtifact(f"{entry['file']} differs from what was written (sha256)")
        return data

    def chunks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes from start to end (exclusive), in pieces."""
        path = self._path(name)
        with storage():
            if not self.is_local:
                for at in range(start, end, 16 * CHUNK):
                    yield self.system.cat_file(path, start=at, end=min(end, at + 16 * CHUNK))
                return
            with open(path, "rb") as stream:
                stream.seek(start)
                while start < end and (piece := stream.read(min(CHUNK, end - start))):
                    start += len(piece)
                    yield piece

    def signed(self, name: str, seconds: int = 3600) -> str:
        """Return a URL by which a client fetches the file itself. Raises ArtifactError if there is none."""
        try:
            return self.system.sign(self._path(name), expiration=seconds)
        except NotImplementedError as error:
            raise ArtifactError("this storage signs no URLs: set redirect: false") from error

    def remove(self, folder: str) -> None:
        """Remove a folder and all in it, if it is there."""
        path = self._path(folder)
        with storage():
            self.system.invalidate_cache()  # others write, too
            if self.system.exists(path):
                self.system.rm(path, recursive=True)

    def folders(self, folder: str) -> list[str]:
        """Return the names of what lies directly in a folder."""
        path = self._path(folder)
        with storage():
            self.system.invalidate_cache()
            if not self.system.exists(path):
                return []
            return [Path(one).name for one in self.system.ls(path, detail=False)]


@contextmanager
def storage() -> Generator[None, None, None]:
    """Let storage that is away raise an ArtifactError, and a file that is not there MissingArtifact.

    What storages raise is as many classes as there are storages.
    """
    try:
        yield
    except (RaydistillError, GeneratorExit):
        raise
    except FileNotFoundError as gone:
        raise MissingArtifact(f"{gone}: it was there") from gone
    except Exception as failed:
        raise ArtifactError(f"the storage of artefacts fails ({failed!r})") from failed
