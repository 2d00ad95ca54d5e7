"""Checkpoints: written beside, verified, then named. A torn one is never picked.

    <run>/checkpoints/semantic-step-000123/
        student/part-00000-of-00002.safetensors   per role and rank: weights and optimizer states
        averages/part-00000-of-00002.safetensors  moving averages, per rank
        state.json                                step, settings, plan
        manifest.json                             bytes and sha256 of all the others, written last

A folder counts if its manifest is there and every file agrees with it. Nothing in it is ever unpickled.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout

from raydistill.artifacts import MANIFEST, Manifest, differences, file_entry, write_json
from raydistill.errors import (
    ArtifactError,
    CorruptArtifact,
    DistillError,
    IncompatibleCheckpoint,
    MissingArtifact,
    disk_full_explained,
)
from raydistill.experts.parts import Parts, part_name
from raydistill.experts.plain_engine import rank_and_size
from raydistill.experts.protocols import Saved
from raydistill.models.folders import sync

logger = logging.getLogger(__name__)

STATE, STUDENT, AVERAGES = "state.json", "student", "averages"
LOCK = ".lock"
_NAME = re.compile(r"(?P<stage>.+)-step-(?P<step>\d{6,})")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, besides its weights. All JSON."""

    stage: str
    """'semantic' or 'detail'."""
    step: int
    """Optimizer steps done."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Everything that shapes the numbers; resuming with others is refused."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The data plan's integers; resuming with others is refused too."""

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.stage}-step-{self.step:06d}"


def save(
    run_dir: Path,
    state: TrainState,
    *,
    parts: Mapping[str, Saved],
    keep: int = 2,
) -> Path:
    """Write a checkpoint and return its folder; called by all ranks, between accumulation rounds.

    `parts` are the engines by role, and the averages. Whatever kills it leaves either the whole checkpoint or
    none, and the older ones as they were.
    Raises DistillError if the disk is full.
    """
    folder = run_dir / "checkpoints" / state.name
    with disk_full_explained(folder, DistillError):
        _write(folder, state, parts)
        if rank_and_size()[0] == 0:
            prune(run_dir, state, keep)
    _wait()
    return folder


def _write(folder: Path, state: TrainState, parts: Mapping[str, Saved]) -> None:
    """Write beside, describe, publish."""
    rank, world_size = rank_and_size()
    beside = folder.with_name(f".tmp-{state.name}")
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _wait()
    for name, part in parts.items():
        part.save(beside / name)
    mine = [f"{name}/{part_name(rank, world_size)}" for name in parts]
    if rank == 0:
        write_json(beside / STATE, asdict(state))
        mine.append(STATE)
    files = _describe(beside, mine, world_size)
    if rank == 0:
        Manifest(kind="checkpoint", identity={"name": state.name}, files=files).write(beside)
        _publish(beside, folder, parts)


def load(folder: Path, expected: TrainState, *, parts: Mapping[str, Saved]) -> TrainState:
    """Restore what `save` was given, on any number of ranks and at any ZeRO stage; called by all ranks.

    `expected` says which stage, settings and plan this run has; its step is not looked at. Verify the folder
    before. Raises IncompatibleCheckpoint, naming every difference.
    """
    state = require_same_run(folder, expected)
    for name, part in parts.items():
        if not (folder / name).is_dir():
            raise IncompatibleCheckpoint(f"{folder} holds no '{name}'")
        part.load(folder / name)
    if STUDENT in parts and (found := Parts(folder / STUDENT).step) != state.step:
        raise IncompatibleCheckpoint(f"{folder / STUDENT} is of step {found}, not {state.step}")
    return state


def require_same_run(folder: Path, expected: TrainState) -> TrainState:
    """Return the checkpoint's state. Raises IncompatibleCheckpoint unless it is of the `expected` run."""
    state = read_state(folder)
    wrong = differences(_identity(state), _identity(expected))
    if wrong:
        listing = ";\n  ".join(wrong)
        raise IncompatibleCheckpoint(
            f"{folder} belongs to another run (saved != asked for):\n  {listing}.\n"
            "Give this run an output folder of its own, or the old settings."
        )
    return state


def read_state(folder: Path) -> TrainState:
    """Return what `state.json` says. Verify the folder before."""
    return TrainState(**json.loads((folder / STATE).read_bytes()))


def step_of(folder: Path | None) -> int:
    """Return the optimizer step of a checkpoint from its name, which is part of its manifest; 0 for None."""
    match = _NAME.fullmatch(folder.name) if folder else None
    return int(match["step"]) if match else 0


def verify(folder: Path, *, contents: bool = True) -> None:
    """Compare a checkpoint with its manifest. Raises MissingArtifact, CorruptArtifact."""
    manifest = Manifest.read(folder)
    if manifest.kind != "checkpoint" or manifest.identity.get("name") != folder.name:
        raise CorruptArtifact(f"{folder} has the manifest of something else: {manifest.identity}")
    if STATE not in manifest.files:
        raise MissingArtifact(f"{folder} has no {STATE}")
    manifest.verify(folder, contents=contents)


def newest_verified(run_dir: Path, stage: str, *, contents: bool = True) -> Path | None:
    """Return the newest checkpoint of a stage whose every byte agrees with its manifest, or None.

    Those passed over are logged with the reason. Without `contents` only the files' sizes are compared.
    """
    return next(_sound(run_dir, stage, contents=contents), None)


def prune(run_dir: Path, reached: TrainState, keep: int) -> None:
    """Delete all but the newest `keep` sound checkpoints of a stage; damaged ones do not count and go too.

    So do those beyond the step that is `reached`: the run began before them, so they were found damaged.
    """
    stage = reached.stage
    sound = [f for f in _sound(run_dir, stage, contents=False) if step_of(f) <= reached.step]
    kept = set(sound[:keep])
    for folder in _folders(run_dir, stage):
        if folder not in kept:
            # The manifest first, so that a deletion cut short leaves nothing to pick.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Hold a run folder: two runs in one would take each other's records and checkpoints away.

    Raises DistillError if another process holds it, on any machine whose file system knows locks. The system
    frees it when the process ends, however it ends.
    """
    lock = FileLock(run_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as taken:
        raise DistillError(
            f"another run is going on in {run_dir}: wait for it, or choose another output"
        ) from taken
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(run_dir: Path) -> None:
    """Delete what killed writers left. Only where no run is going on in this folder."""
    for leftover in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sound(run_dir: Path, stage: str, *, contents: bool) -> Iterator[Path]:
    """Yield checkpoints that agree with their manifests, newest first."""
    for folder in _folders(run_dir, stage):
        try:
            verify(folder, contents=contents)
        except (ArtifactError, OSError) as reason:
            logger.warning("checkpoint %s is passed over: %s", folder.name, reason)
        else:
            yield folder


def _folders(run_dir: Path, stage: str) -> list[Path]:
    """Return a stage's checkpoint folders, sound or not, newest first."""
    found = []
    for folder in (run_dir / "checkpoints").glob(f"{stage}-step-*"):
        match = _NAME.fullmatch(folder.name)
        if match and match["stage"] == stage and folder.is_dir():
            found.append((int(match["step"]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _describe(folder: Path, names: Iterable[str], world_size: int) -> dict[str, Any]:
    """Sync and hash what this rank wrote; return the manifest's entries of all ranks, on every rank.

    By name: on network storage a listing may lack what other machines have just written.
    """
    entries = {}
    for name in names:
        with open(folder / name, "rb") as stream:
            os.fsync(stream.fileno())
        entries[name] = file_entry(folder / name)
    if world_size == 1:
        return entries
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, entries)
    return {name: entry for share in shares for name, entry in share.items()}


def _publish(beside: Path, folder: Path, roles: Iterable[str]) -> None:
    """Give the finished folder its name, durably; a damaged one of that name gives way."""
    for path in (*(beside / role for role in roles), beside):
        sync(path)
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    os.replace(beside, folder)
    sync(folder.parent)


def _identity(state: TrainState) -> dict[str, Any]:
    """Return what must agree between a checkpoint and the run that takes it up."""
    return {"stage": state.stage, "settings": state.settings, "plan": state.plan}


def _wait() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
