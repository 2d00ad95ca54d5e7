"""Every error raised on purpose.

* RaydistillError
  x ConfigError         the job file or command line is wrong; nothing has run
    + UnknownKey        a key that no schema has
    + InvalidValue      a value outside its range or type
    + MissingValue      a mandatory value is not given
  x ArtifactError       what a stage reads is not what was written
    + MissingArtifact   nothing there, or no manifest: the writer did not finish
    + StaleArtifact     made by other settings, models or code than asked for
    + CorruptArtifact   the bytes differ from what the manifest promises
  x MediaError          one input file cannot be used; carries a reason code
  x PrepareError        too many bad inputs, or none at all
  x DistillError        a run stopped itself
    + NonFiniteLoss     a loss term or a gradient norm is NaN or infinite
    + IncompatibleCheckpoint
    + DoesNotFit        a plan asks for more memory than a device has
    + PlanMismatch      the feed delivered other samples than the plan says
  x SamplingError       a plan of jumps that no expert was trained for
  x TooFewFrames        a loss or measure needs more frames than it got
  x ServiceError        what the server says instead of a video
    + RequestRefused    a request that gets an answer of 4xx or 5xx; carries its status and code
    + LeaseLost         a job that this worker no longer holds: cancelled, or taken over by another

Ray ships exceptions between processes by pickle, which calls `type(error)(*error.args)` and so loses every
error with fields; `__reduce__` here rebuilds them from their fields instead.
"""

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path


class RaydistillError(Exception):
    """Base of every error that raydistill raises on purpose."""

    def __reduce__(self):
        """Rebuild from the dataclass fields, keeping notes."""
        values = tuple(getattr(self, f.name) for f in fields(self)) if is_dataclass(self) else self.args
        return type(self), values, self.__dict__


class ConfigError(RaydistillError):
    """The job file or the command line is wrong; nothing has run."""


@dataclass(eq=False)
class UnknownKey(ConfigError):
    """A key that the schema does not have."""

    key: str
    known: tuple[str, ...] = ()

    def __str__(self):
        """Name the key and its nearest neighbour."""
        leaf = self.key.rpartition(".")[2]
        leaves = {known: known.rpartition(".")[2] for known in self.known}
        elsewhere = [
            known for known in self.known if leaves[known] == leaf
        ]  # the right name, the wrong section
        near = get_close_matches(self.key, elsewhere, n=1, cutoff=0.0)
        near = near or get_close_matches(self.key, self.known, n=1, cutoff=0.5)
        if not near and (close := get_close_matches(leaf, leaves.values(), n=1)):
            near = [known for known in self.known if leaves[known] == close[0]]
        return f"unknown key '{self.key}'" + (f": did you mean '{near[0]}'?" if near else "")


@dataclass(eq=False)
class InvalidValue(ConfigError):
    """A value outside its range or of the wrong type."""

    key: str
    value: object
    expected: str

    def __str__(self):
        """Say what was given and what is allowed."""
        return f"{self.key} = {self.value!r}: {self.expected}"


@dataclass(eq=False)
class MissingValue(ConfigError):
    """A mandatory value that neither the file nor the command line gives."""

    key: str
    hint: str = ""

    def __str__(self):
        """Name the key."""
        return f"{self.key} must be given" + (f": {self.hint}" if self.hint else "")


class ArtifactError(RaydistillError):
    """What a stage reads is not what was written."""


class MissingArtifact(ArtifactError):
    """Nothing there, or no manifest: the writer did not finish."""


class StaleArtifact(ArtifactError):
    """Made by other settings, models or code than asked for."""


class CorruptArtifact(ArtifactError):
    """The bytes differ from what the manifest promises."""


@dataclass(eq=False)
class MediaError(RaydistillError):
    """One input file cannot be used."""

    reason: str
    message: str
    uri: str = ""

    def __str__(self):
        """Reason code first, then the file, then the decoder's words."""
        return f"{self.reason}: {self.uri}: {self.message}" if self.uri else f"{self.reason}: {self.message}"


class PrepareError(RaydistillError):
    """Too many bad inputs, or none at all."""


class DistillError(RaydistillError):
    """A run stopped itself."""


@dataclass(eq=False)
class NonFiniteLoss(DistillError):
    """A loss term, or the norm of its gradient, is NaN or infinite."""

    term: str
    step: int
    value: float

    def __str__(self):
        """Name the term and the step."""
        return (
            f"'{self.term}' is {self.value} at step {self.step}; the last checkpoint is intact. "
            "Lower the learning rate, raise huber_c, or look at the data of this step."
        )


@dataclass(eq=False)
class DoesNotFit(DistillError):
    """A plan asks for more memory than a device has."""

    stage: str
    needed_gib: float
    usable_gib: float
    changes: tuple[str, ...] = ()
    """What to set, and how many GiB that alone would leave."""

    def __str__(self):
        """Say what is missing and what would help."""
        tried = "; ".join(self.changes) or "no setting is left: take a smaller clip or a larger device"
        return (
            f"the {self.stage} stage needs {self.needed_gib:.1f} GiB of {self.usable_gib:.1f} usable on each "
            f"device. Each alone, in GiB: {tried}"
        )


class IncompatibleCheckpoint(DistillError):
    """A checkpoint of another run, plan, or set of weights."""


class PlanMismatch(DistillError):
    """The feed delivered other samples than the plan says."""


class SamplingError(RaydistillError):
    """A plan of jumps that no expert was trained for."""


class TooFewFrames(RaydistillError):
    """A loss or measure needs more frames than it got."""


class ServiceError(RaydistillError):
    """What the server says instead of a video."""


@dataclass(eq=False)
class RequestRefused(ServiceError):
    """A request that gets an answer of 4xx or 5xx."""

    status: int
    code: str
    """Stable, for programs."""
    message: str
    """What to do, for people."""
    param: str | None = None
    """The field that is wrong."""
    retry_after_s: float | None = None
    """When it may be tried again; None: never as it is."""

    def __str__(self):
        """Code and message."""
        return f"{self.status} {self.code}: {self.message}"


class LeaseLost(ServiceError):
    """A job that this worker no longer holds: it was cancelled, or taken over by another."""


@contextmanager
def disk_full_explained(
    target: Path, error: type[RaydistillError] = PrepareError
) -> Generator[None, None, None]:
    """Turn the ways in which a disk refuses more bytes into an `error` that says what to do."""
    try:
        yield
    except Exception as failed:
        code = _system_code(failed)
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise error(
            f"{target}: no space left: {os.strerror(code)}. Nothing half-written counts. Make room "
            f"under {target.parent} and run the same command again; whatever was finished is kept."
        ) from failed


@contextmanager
def storage_explained(path: Path, damage: tuple[type[Exception], ...]) -> Generator[None, None, None]:
    """Tell a file that cannot be reached, and may be back later, from one with wrong bytes.

    `damage` is what its reader raises for those, besides an OSError without the system's number. Raises
    MissingArtifact, CorruptArtifact, or ArtifactError for storage that fails.
    """
    try:
        yield
    except FileNotFoundError as gone:
        raise MissingArtifact(f"{path} is gone, though its manifest names it: prepare again") from gone
    except (OSError, *damage) as failed:
        if not isinstance(failed, OSError) or failed.errno is None:
            raise CorruptArtifact(f"{path}: {failed}") from failed
        raise ArtifactError(f"{path} cannot be read ({failed}): see to the storage and run again") from failed


def _system_code(failed: Exception) -> int | None:
    """Return the operating system's number of a failure; libraries in Rust give it in their text alone."""
    if isinstance(failed, OSError):
        return failed.errno
    told = re.search(r"\(os error (\d+)\)", str(failed))
    return int(told[1]) if told else None
