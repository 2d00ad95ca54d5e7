"""The prepare job run again: with other files, with other limits, after the disk was full."""

import json
import resource
import threading
from pathlib import Path

import media_zoo
import pytest
from PIL import Image
from prepare_cases import actors_after, digests, prepare, sprites

from raydistill.artifacts import LatentStore
from raydistill.errors import MissingArtifact, PrepareError
from raydistill.flow import connect
from raydistill.models.codec import build_tiny_codec
from raydistill.world.flow import index
from raydistill.world.folder import Source

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster():
    with connect(num_cpus=2, object_store_mib=200):
        yield


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "codec"
    build_tiny_codec(0, width=8).save(folder)
    return folder


def put_pictures(folder: Path, numbers: range, bad: str = "") -> list[str]:
    """Write pictures with captions; return the settings that make them the source."""
    folder.mkdir(exist_ok=True)
    frames = media_zoo.numbered(numbers.stop)
    for number in numbers:
        Image.fromarray(frames[number]).save(folder / f"{number}.png")
    if bad:
        (folder / bad).write_bytes(b"no picture")
    return [
        "source.kind=images",
        f"source.path={folder}",
        "source.caption_policy=empty",
        "shard.files_per_shard=2",
        "tolerance.max_bad_fraction=1",
    ]


def quarantined(folder: Path) -> dict[str, str]:
    """File and reason of everything in an artifact's quarantine lists."""
    lines = [line for p in (folder / "quarantine").glob("*.jsonl") for line in p.read_text().splitlines()]
    return {about["uri"]: about["reason"] for about in map(json.loads, lines)}


def test_an_artifact_describes_its_own_inputs_and_no_others(cluster, codec, tmp_path):
    mine = put_pictures(tmp_path / "mine", range(20), bad="bad.png")
    first = prepare(codec, tmp_path / "out", *mine)
    before = LatentStore(first)
    assert (len(before), quarantined(first)) == (20, {"bad.png": "not_media"})

    (tmp_path / "mine" / "bad.png").unlink()
    put_pictures(tmp_path / "mine", range(20, 21))
    second = prepare(codec, tmp_path / "out", *mine)
    after = LatentStore(tmp_path / "out")
    assert after.folder == second != first
    assert (len(after), quarantined(second)) == (21, {})
    assert after.manifest.fingerprint != before.manifest.fingerprint
    named = {name for name in after.manifest.files if name in before.manifest.files}
    assert len(named) > len(after.manifest.files) / 2  # and those are shared, not made again
    assert all((first / name).samefile(second / name) for name in named)
    assert {p.name for p in second.glob("*.parquet")} == set(after.manifest.files)

    others = put_pictures(tmp_path / "others", range(30, 33))
    prepare(codec, tmp_path / "out", *others)
    assert len(LatentStore(tmp_path / "out")) == 3
    for folder, store in ((first, before), (second, after)):
        LatentStore(folder).verify()
        assert LatentStore(folder).fingerprint == store.fingerprint
    assert prepare(codec, tmp_path / "out", *mine) == second


def test_a_longer_deadline_gives_files_another_try(cluster, codec, tmp_path):
    pictures = put_pictures(tmp_path / "pictures", range(3))
    with pytest.raises(PrepareError, match="none of 3 files gave a clip: 3 timeout"):
        prepare(codec, tmp_path / "out", *pictures, "limits.deadline_s=0.1")  # no child starts in that time
    folder = prepare(codec, tmp_path / "out", *pictures)
    assert (len(LatentStore(folder)), quarantined(folder)) == (3, {})
    again = digests(folder)
    prepare(codec, tmp_path / "out", *pictures, "limits.deadline_s=90")
    assert digests(folder) == again  # nothing in quarantine that time could help


def test_hashing_tells_how_far_it_is(cluster, tmp_path):
    sizes = [2**30, 2**30 + 1, 5, 6]
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]))
    sources = [Source(f"{number}.mp4", size, 0) for number, size in enumerate(sizes)]
    told: list[tuple[int, int]] = []
    known = {("3.mp4", 6, 0): "0" * 64}
    found = index(
        tmp_path, sources, policy="empty", captions=None, known=known, report=lambda *now: told.append(now)
    )
    assert [i.uri for i in found] == [s.uri for s in sources]
    assert len(told) == 3  # one task for each large file, one for the small ones together
    assert told == sorted(told)
    assert told[-1] == (4, sum(sizes[:3]))


def limit_files_after(shards: int, output: Path, limited: list[str]) -> None:
    """Let the encode actors write no file beyond 1,000 bytes, as soon as there are so many shards."""
    for pid, command in actors_after(shards, output, "EncodeShards").items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, 1000))
        limited.append(command)


def test_files_that_may_not_grow_are_a_full_disk(cluster, codec, tmp_path):
    """What a full disk does: the system refuses an actor's next file."""
    pairs, limited = sprites(tmp_path / "clips"), list[str]()
    limiter = threading.Thread(target=limit_files_after, args=(2, tmp_path / "out", limited))
    limiter.start()
    with pytest.raises(PrepareError, match=r"no space left.*run the same command again"):
        prepare(codec, tmp_path / "out", *pairs)
    limiter.join()
    assert limited
    with pytest.raises(MissingArtifact):
        LatentStore(tmp_path / "out")
    (folder,) = (p for p in (tmp_path / "out").iterdir() if p.is_dir())
    kept = digests(folder)
    assert kept
    assert not list(folder.glob("**/*.tmp"))
    assert prepare(codec, tmp_path / "out", *pairs) == folder
    assert kept.items() <= digests(folder).items()
    assert len(LatentStore(folder)) == 40
