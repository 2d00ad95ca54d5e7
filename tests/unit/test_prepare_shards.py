"""Shards: committed whole or not at all, and found again by the next run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raydistill.artifacts import LatentStore
from raydistill.errors import PrepareError, disk_full_explained
from raydistill.latents.shards import adopt_shard, finished_shard, latent_row, write_quarantine, write_shard
from raydistill.shards import write_artifact

IDENTITY = {"stage": "prepare", "dtype": "float32"}


def rows(count: int = 3) -> list[dict]:
    rng = np.random.default_rng(count)
    return [
        latent_row(rng.standard_normal((4, 2, 4, 4)), np.zeros((8, 32)), "c", f"{i}") for i in range(count)
    ]


def test_a_finished_shard_is_found_again(tmp_path):
    written = write_shard(tmp_path, "s", rows(), IDENTITY, facts={"clips": 3})
    assert finished_shard(tmp_path, "s", IDENTITY) == written
    assert finished_shard(tmp_path, "t", IDENTITY) is None
    assert finished_shard(tmp_path, "s", {**IDENTITY, "dtype": "float16"}) is None


@pytest.mark.parametrize("harm", ["cut", "flip", "no manifest", "no data", "short data"])
def test_a_harmed_shard_does_not_count(tmp_path, harm):
    write_shard(tmp_path, "s", rows(), IDENTITY)
    record, data = tmp_path / "s.manifest.json", tmp_path / "s.parquet"
    text = record.read_bytes()
    if harm == "cut":
        record.write_bytes(text[: len(text) // 2])
    elif harm == "flip":
        record.write_bytes(text.replace(b'"rows": 3', b'"rows": 2'))
    elif harm == "no manifest":
        record.unlink()
    elif harm == "no data":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-1])
    assert finished_shard(tmp_path, "s", IDENTITY) is None


def test_writing_again_gives_the_same_rows(tmp_path):
    digests = [next(iter(write_shard(tmp_path, "s", rows(), IDENTITY).files.values())) for _ in range(2)]
    assert digests[0]["rows_digest"] == digests[1]["rows_digest"]
    assert {p.name for p in tmp_path.iterdir()} == {"s.parquet", "s.manifest.json"}


def test_an_empty_shard_counts(tmp_path):
    manifest = write_shard(tmp_path, "s", [], IDENTITY)
    write_artifact(tmp_path, [manifest, write_shard(tmp_path, "t", rows(), IDENTITY, order=1)], IDENTITY)
    assert len(LatentStore(tmp_path)) == 3


LIMITS = {"deadline_s": 2.0, "memory_gib": 4.0}


@pytest.mark.parametrize(
    ("reason", "limits", "kept"),
    [
        ("timeout", {}, True),
        ("timeout", {"deadline_s": 1.0}, True),
        ("timeout", {"deadline_s": 3.0}, False),
        ("oom", {"memory_gib": 5.0}, False),
        ("crash", {"memory_gib": 5.0}, False),
        ("truncated", {"deadline_s": 3.0, "memory_gib": 5.0}, True),
        ("changed", {}, False),
    ],
)
def test_files_that_may_fare_better_get_another_try(tmp_path, reason, limits, kept):
    facts = {"files": [["a", "sha", "clip", ""], ["b", "sha", "quarantined", reason]], "tried_with": LIMITS}
    write_shard(tmp_path, "s", rows(), IDENTITY, facts=facts)
    assert bool(finished_shard(tmp_path, "s", IDENTITY, {**LIMITS, **limits})) == kept


def test_a_finished_shard_is_shared_with_other_inputs(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    write_quarantine(theirs, "s", [{"uri": "a.mp4", "reason": "truncated"}])
    written = write_shard(theirs, "s", rows(), IDENTITY)
    assert adopt_shard(ours, "t", IDENTITY, LIMITS, [theirs]) is None
    assert adopt_shard(ours, "s", {"other": 1}, LIMITS, [theirs]) is None
    assert not ours.exists()
    assert adopt_shard(ours, "s", IDENTITY, LIMITS, [ours, theirs]) == written
    assert finished_shard(ours, "s", IDENTITY) == written
    assert (ours / "s.parquet").samefile(theirs / "s.parquet")
    assert (ours / "quarantine" / "s.jsonl").samefile(theirs / "quarantine" / "s.jsonl")
    write_quarantine(ours, "s", [])
    write_shard(ours, "s", rows(5), IDENTITY)
    assert finished_shard(theirs, "s", IDENTITY) == written  # what is written again is no longer shared
    written.verify(theirs)
    assert (theirs / "quarantine" / "s.jsonl").exists()


WRITE_WITH_LITTLE_ROOM = """
import resource, signal, sys
import numpy as np
from raydistill.errors import PrepareError, disk_full_explained
from raydistill.latents.shards import latent_row, write_shard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = [latent_row(np.zeros((4, 16, 4, 4)), np.zeros((8, 32)), "c", "s") for _ in range(20)]
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (0, 3000, 150_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        write_shard(sys.argv[1], "s", rows, {"stage": "prepare"})
    except PrepareError as full:
        print(full)
"""


def test_no_room_is_a_clear_error_and_leaves_nothing(tmp_path):
    """The system refuses to let a file grow beyond some length, as a full disk does."""
    folder = tmp_path / "out"
    command = [sys.executable, "-c", WRITE_WITH_LITTLE_ROOM, str(folder)]
    said = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[2])
    assert said.count("no space left") == said.count("run the same command again") == 3
    assert list(folder.iterdir()) == []
    assert finished_shard(folder, "s", {"stage": "prepare"}) is None


def test_other_io_errors_are_not_called_full(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), disk_full_explained(tmp_path):
        (tmp_path / "file" / "x").write_bytes(b"")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with full, pytest.raises(PrepareError, match="no space left"), disk_full_explained(tmp_path):
        full.write(b"x")


def test_quarantine_lists_are_replaced(tmp_path):
    write_quarantine(
        tmp_path, "s", [{"uri": "a.mp4", "reason": "timeout"}, {"uri": "b.mp4", "reason": "oom"}]
    )
    lines = (tmp_path / "quarantine" / "s.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["timeout", "oom"]
    write_quarantine(tmp_path, "s", [])
    assert not list((tmp_path / "quarantine").iterdir())
