"""The encoder gives what codec and text encoder give, one by one; the drawn world is what it says."""

import json

import av
import numpy as np
import pytest
import torch

from raydistill.artifacts import file_sha256
from raydistill.errors import StaleArtifact
from raydistill.latents.encode import Encoder, frames_to_tensor
from raydistill.models.codec import build_tiny_codec, load_codec
from raydistill.models.text import WordVectors
from raydistill.world.drawing import World
from raydistill.world.sprites import Attributes, held_out, render


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "codec"
    build_tiny_codec(0, width=8).save(folder)
    return folder


def test_frames_fill_the_range():
    clip = np.array([0, 255, 127], np.uint8).reshape(1, 1, 1, 3)
    tensor = frames_to_tensor([clip])
    assert tensor.shape == (1, 3, 1, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1.0, 1.0, -1 / 255], abs=1e-6)


def test_batches_give_what_single_clips_give(codec):
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8) for frames in (4, 4, 4, 1, 4)]
    captions = ["a red square", "", "a blue circle", "x", "y"]
    encoder = Encoder(codec, text=WordVectors(4, 6), batch_size=2)
    plain = load_codec(codec)
    for (latents, text), clip, caption in zip(encoder(clips, captions), clips, captions, strict=True):
        with torch.inference_mode():
            expected = plain.encode(frames_to_tensor([clip]))[0].numpy()
        assert latents.shape == expected.shape == (4, len(clip), 2, 2)
        np.testing.assert_allclose(latents, expected, atol=1e-5)
        assert np.array_equal(text, WordVectors(4, 6)([caption])[0].numpy())
    assert encoder([], []) == []


def test_half_precision(codec):
    encoder = Encoder(codec, text=WordVectors(), batch_size=2, dtype="float16")
    ((latents, _),) = encoder([np.zeros((1, 8, 8, 3), np.uint8)], [""])
    assert latents.dtype == np.float16


def test_the_world_on_disk_is_the_world_drawn(tmp_path):
    World(str(tmp_path), 3).draw(range(6))
    for number in range(6):
        scene = World(str(tmp_path), 3).scene(number)
        video = tmp_path / f"clip_{number:06d}.mp4"
        with av.open(str(video)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        off = np.abs(frames.astype(int) - render(scene))
        assert off.mean() < 1  # of 255: colours survive
        assert off.max() < 24
        sidecar = json.loads(video.with_suffix(".json").read_text())
        assert sidecar["truth"] == scene.truth()
        assert sidecar["bytes"] == video.stat().st_size
        assert not held_out(Attributes.parse(sidecar["caption"]))


def test_drawing_again_gives_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    World(str(tmp_path / "a")).draw([0, 1])
    World(str(tmp_path / "b")).draw([1, 0])
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_a_clip_has_the_same_bytes_however_often_it_is_drawn(tmp_path):
    # What the process did before must not matter: many in a row, between allocations of many sizes. With
    # x264's assembly one drawing in some hundreds differs, so this fails most times, not every time.
    rng, clips = np.random.default_rng(0), (150, 152, 272)
    seen = set()
    for _ in range(60):
        _kept = [rng.bytes(int(size)) for size in rng.integers(100, 20_000, 20)]
        World(str(tmp_path)).draw(clips)
        seen |= {file_sha256(tmp_path / f"clip_{number:06d}.mp4") for number in clips}
    assert len(seen) == len(clips)


def test_only_whole_clips_count_as_drawn(tmp_path):
    World(str(tmp_path)).draw(range(4))
    (tmp_path / "clip_000000.mp4").write_bytes(b"torn")
    (tmp_path / "clip_000001.json").unlink()
    (tmp_path / "clip_000002.json").write_text("{")
    assert World(str(tmp_path)).finished(5) == {3}


def test_a_folder_holds_one_world(tmp_path):
    World(str(tmp_path), 0).open()
    World(str(tmp_path), 0).open()
    with pytest.raises(StaleArtifact, match="seed 0"):
        World(str(tmp_path), 1).open()
