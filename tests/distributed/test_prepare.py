"""The prepare job on a real Ray: every file accounted for, and the same rows whatever is killed meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import av
import media_zoo
import numpy as np
import pytest
import ray
from PIL import Image
from prepare_cases import ROOT, actors_after, descendants, digests, prepare, settings, sprites
from ray.data import DataContext
from shared_memory import left_since, shared_memory

from raydistill.artifacts import LatentStore, Manifest
from raydistill.errors import MissingArtifact, PrepareError
from raydistill.flow import connect
from raydistill.latents.encode import Encoder
from raydistill.latents.tally import LEFT_OUT
from raydistill.models.codec import build_tiny_codec
from raydistill.models.text import WordVectors
from raydistill.world.clips import FILTERED, Cut, fit
from raydistill.world.flow import DecodeOptions, decode_shards
from raydistill.world.folder import list_sources
from raydistill.world.inputs import deal, examine
from raydistill.world.media import Limits
from raydistill.world.sprites import Attributes, held_out


@pytest.fixture(scope="module")
def cluster():
    before = shared_memory()
    ours = not ray.is_initialized()
    with connect(num_cpus=2, object_store_mib=200):
        yield
    if ours:
        assert not left_since(before)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "codec"
    build_tiny_codec(0, width=8).save(folder)
    return folder


@pytest.fixture(scope="module")
def world(cluster, codec, tmp_path_factory):
    """The small world, prepared without disturbance: its folder and its latents."""
    folder = tmp_path_factory.mktemp("world")
    prepare(codec, folder / "latents", *sprites(folder / "clips"))
    return folder / "clips", LatentStore(folder / "latents")


def test_the_small_world_becomes_latents(world, codec):
    clips, store = world
    assert len(store) == 40
    encoder = Encoder(codec, text=WordVectors(), batch_size=1)
    pictures = {}
    for path in clips.glob("*.json"):
        if path.name != "world.json":
            pictures.setdefault(json.loads(path.read_text())["caption"], []).append(path.with_suffix(".mp4"))
    for row in [store.row(i) for i in (0, 17, 39)]:
        assert not held_out(Attributes.parse(row.caption))
        candidates = [encoder([read_all(p)], [row.caption])[0] for p in pictures[row.caption]]
        nearest, text = min(candidates, key=lambda c: np.abs(c[0] - row.latents).max())
        np.testing.assert_allclose(row.latents, nearest, atol=1e-5)
        assert np.array_equal(row.text, text)
    store.verify()


def read_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_running_again_does_nothing_again(world, codec):
    clips, store = world
    before = digests(store.folder)
    victim = clips / "clip_000003.mp4"
    status, data = victim.stat(), victim.read_bytes()
    victim.write_bytes(bytes(len(data)))  # a file that is not read again may hold anything
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(codec, store.folder.parent, *sprites(clips))
    victim.write_bytes(data)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests(store.folder) == before
    assert LatentStore(store.folder.parent).fingerprint == store.fingerprint


def kill_job_after_first_shard(codec: Path, output: Path, clips: Path) -> None:
    """Run the job as a user does, on a Ray of its own, and kill it -9; nothing that works may outlive it."""
    words = settings(codec, output, *sprites(clips), "cluster.object_store_mib=100")
    process = subprocess.Popen(
        [sys.executable, "jobs/prepare.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list(output.glob("*/*-*.manifest.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    # Ray's two agents only notice after a minute without a head. They do no work, and nobody waits for them.
    family = {pid: words for pid, words in descendants(process.pid).items() if not is_agent(words)}
    assert any("EncodeShards" in words for words in family.values())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while family and time.monotonic() < deadline:
        family = {pid: words for pid, words in family.items() if Path(f"/proc/{pid}").exists()}
        time.sleep(0.05)
    assert not family, "processes outlived the job"
    for logs in Path("/tmp").glob(f"raydistill-{process.pid}-*"):
        shutil.rmtree(logs)


def is_agent(words: str) -> bool:
    return words.startswith(("ray::RuntimeEnvAgent", "ray::DashboardAgent"))


def kill_actors_after(shards: int, output: Path, killed: list[str]) -> None:
    """Kill -9 a decode actor of this process's Ray at work, and the encode actor after so many shards."""
    for count, name in ((0, "DecodeShards)).submit"), (shards, "EncodeShards")):
        for pid in actors_after(count, output, name):
            os.kill(pid, signal.SIGKILL)
            killed.append(name)


@pytest.mark.long
def test_killed_job_and_killed_actors_change_nothing(world, codec, tmp_path):
    clips, store = world
    kill_job_after_first_shard(codec, tmp_path / "out", clips)
    (folder,) = (p for p in (tmp_path / "out").iterdir() if p.is_dir())
    with pytest.raises(MissingArtifact):
        LatentStore(tmp_path / "out")
    finished = digests(folder)
    assert 0 < len(finished) < 20
    killed: list[str] = []
    killer = threading.Thread(target=kill_actors_after, args=(len(finished) + 2, tmp_path / "out", killed))
    killer.start()
    prepare(codec, tmp_path / "out", *sprites(clips))
    killer.join()
    assert len(killed) >= 2
    assert LatentStore(tmp_path / "out").fingerprint == store.fingerprint
    assert finished.items() <= digests(folder).items()  # what was finished is untouched
    LatentStore(tmp_path / "out").verify()


@pytest.fixture
def small_blocks(cluster):
    """Ray splits blocks above this size, unless told not to: a shard must stay in one piece."""
    context = DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, 10_000
    yield
    context.target_max_block_size = before


def test_every_file_of_the_zoo_is_accounted_for(small_blocks, codec, tmp_path):
    zoo, out = tmp_path / "zoo", tmp_path / "out"
    (zoo / "deep").mkdir(parents=True)
    expected = media_zoo.build(zoo)
    media_zoo.write(zoo / "deep" / "silent.mp4", media_zoo.numbered(80))
    shutil.copy(zoo / "h264.mp4", zoo / "deep" / "twin.mp4")
    (zoo / "deep" / "twin.txt").write_text("the same bytes")
    expected |= {"deep/silent.mp4": "missing_caption", "h264.mp4": "duplicate", "deep/twin.mp4": ""}
    pairs = [
        "source.kind=videos",
        f"source.path={zoo}",
        "tolerance.max_bad_fraction=1",
        "decode.audit_every=1",
    ]
    pairs += ["shard.files_per_shard=8", "clip.height=64", "clip.width=96"]
    folder = prepare(codec, out, *pairs)
    manifest = Manifest.read(folder)
    found = {}
    for shard in folder.glob("*-*.manifest.json"):
        found |= {uri: reason for uri, _, _, reason in Manifest.read(shard).facts["files"]}
    lists = [
        json.loads(line)
        for p in (folder / "quarantine").glob("*.jsonl")
        for line in p.read_text().splitlines()
    ]
    found |= {row["uri"]: row["reason"] for row in lists}
    found |= {"deep/silent.mp4": "missing_caption", "h264.mp4": "duplicate"}  # settled before any shard
    assert found == expected
    left_out = [json.loads(line) for line in (folder / LEFT_OUT).read_text().splitlines()]
    assert {row["uri"]: row["reason"] for row in left_out} == {u: r for u, r in expected.items() if r}
    assert all((row["outcome"] == "filtered") == (row["reason"] in FILTERED) for row in left_out)
    counted = Counter(expected.values())
    kept = counted.pop("")
    facts = manifest.facts
    assert (facts["inputs"], facts["kept"]) == (len(expected), kept)
    assert facts["filtered"] == {reason: n for reason, n in counted.items() if reason in FILTERED}
    assert facts["quarantined"] == {reason: n for reason, n in counted.items() if reason not in FILTERED}
    assert facts["inputs"] == facts["kept"] + sum(facts["filtered"].values()) + sum(
        facts["quarantined"].values()
    )
    store = LatentStore(out)
    rows = {row.caption.removeprefix("a video called "): row for row in store}
    assert len(rows) == kept == facts["clips"]
    encoder = Encoder(codec, text=WordVectors(), batch_size=1)
    for name in ("lossless.mp4", "edit_list.mp4", "ten_bit.mp4"):  # kept clips' frames are the right ones
        ((latents, _),) = encoder([read_all(zoo / name)[0:48:3]], [""])
        np.testing.assert_allclose(rows[name].latents, latents, atol=1e-5)


def test_missing_captions_can_be_an_error(cluster, codec, tmp_path):
    media_zoo.write(tmp_path / "0.mp4", media_zoo.numbered(3))
    pairs = ["source.kind=videos", f"source.path={tmp_path}", "source.caption_policy=error"]
    with pytest.raises(PrepareError, match=r"1 files have no caption: 0\.mp4.*caption_policy"):
        prepare(codec, tmp_path / "out", *pairs)


def test_an_empty_folder_says_what_to_do(cluster, codec, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingArtifact, match="put files there"):
        prepare(codec, tmp_path / "out", "source.kind=videos", f"source.path={tmp_path / 'empty'}")


def test_images_with_a_captions_file(cluster, codec, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, frame in enumerate(media_zoo.numbered(5)):
        Image.fromarray(frame).save(pictures / f"{number}.png")
    captions = tmp_path / "captions.jsonl"
    lines = [json.dumps({"file": f"{n}.png", "caption": f"picture {n}"}) for n in range(4)]
    captions.write_text("\n".join(lines))
    pairs = ["source.kind=images", f"source.path={pictures}", f"source.captions={captions}"]
    prepare(codec, tmp_path / "out", *pairs)
    store = LatentStore(tmp_path / "out")
    assert store.manifest.facts["filtered"] == {"missing_caption": 1}
    assert sorted(store.column("caption")) == [f"picture {n}" for n in range(4)]
    assert set(store.column("lane")) == {"image"}
    row = next(row for row in store if row.caption == "picture 2")
    encoder = Encoder(codec, text=WordVectors(), batch_size=1)
    ((latents, _),) = encoder([fit(media_zoo.numbered(5)[2:3], 32, 32)], [""])
    assert row.latents.shape == (4, 1, 4, 4)
    np.testing.assert_allclose(row.latents, latents, atol=1e-5)


@pytest.mark.long
def test_hangs_and_crashes_end_in_quarantine(cluster, tmp_path):
    names = ["a_hang", "b_crash", "c_good", "d_greedy", "e_good"]
    for number, name in enumerate(names):
        media_zoo.write(tmp_path / f"{name}.mp4", media_zoo.numbered(60 + number))
    sources, _ = list_sources(tmp_path, "videos")
    shards = deal([examine(tmp_path, s, policy="empty") for s in sources], 2)
    options = DecodeOptions(
        root=str(tmp_path),
        lane="video",
        cut=Cut(num_frames=16, out_fps=8, height=32, width=32),
        limits=Limits(),
        deadline_s=10,
        memory_bytes=2 * 2**30,
        child=str(ROOT / "tests" / "unit" / "decode_stub.py"),
    )
    rows = decode_shards(shards, options).take_all()
    details = {json.loads(row["detail"])["uri"]: (row["outcome"], json.loads(row["detail"])) for row in rows}
    outcomes = {uri: outcome for uri, (outcome, _) in details.items()}
    assert outcomes == {f"{n}.mp4": "clip" if "good" in n else "quarantined" for n in names}
    reasons = [details[f"{name}.mp4"][1].get("reason") for name in names]
    assert reasons == ["timeout", "crash", None, "oom", None]
    assert details["a_hang.mp4"][1]["seconds"] >= 10
