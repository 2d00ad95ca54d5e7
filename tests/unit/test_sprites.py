"""The small world at other sizes: the same scenes, finer; at 32 pixels not a byte differs."""

import hashlib
import json

import av
import numpy as np
import pytest
from PIL import Image

from raydistill.config.prepare import PrepareConfig, SourceConfig
from raydistill.errors import InvalidValue, StaleArtifact
from raydistill.evaluation.centroid import centroid_path
from raydistill.world.drawing import World
from raydistill.world.sprites import ALL, draw_scene, render, shrink

SCENES = [draw_scene(7, attributes) for attributes in ALL[::7]]
AT_32 = np.stack([render(scene) for scene in SCENES])


def test_at_32_pixels_no_byte_has_changed():
    """The digest was taken before clips had other sizes."""
    digest = hashlib.sha256()
    for number in range(40):
        digest.update(render(draw_scene(number)).tobytes())
    assert digest.hexdigest() == "f6f59ef6d477b7a61cf1c4ab2b2bdc6f5e107feb66182bb6c77b144844ac423c"
    for attributes in ALL:
        digest.update(render(draw_scene(7, attributes), 32).tobytes())
    assert digest.hexdigest() == "969b60fdd097eb90ee04779a3de1c4495f46dfeeb9a868031eab9d019b3b2b2c"


@pytest.mark.parametrize("size", [64, 96])
def test_larger_clips_averaged_are_the_small_ones(size):
    large = np.stack([render(scene, size) for scene in SCENES])
    assert large.shape == (len(SCENES), 16, size, size, 3)
    apart = np.abs(shrink(large).astype(int) - AT_32)
    assert apart.mean() < 0.5  # of 255: inside they are equal, and an edge is smoothed otherwise
    assert np.percentile(apart, 99) < 12
    moved = np.abs(centroid_path(shrink(large)) - centroid_path(AT_32))
    assert moved.max() < 0.1  # px


def test_larger_clips_are_finer_than_small_ones_made_larger():
    """Edges one pixel wide: along a row through the shape as many pixels are neither in nor out."""
    large = np.stack([render(scene, 64) for scene in SCENES])
    steps = [np.abs(np.diff(clips.astype(int), axis=3)).max(axis=(1, 2, 3, 4)) for clips in (AT_32, large)]
    doubled = AT_32.repeat(2, axis=2).repeat(2, axis=3)
    assert np.abs(large.astype(int) - doubled).max() > 100
    assert (steps[1] > 0.7 * steps[0]).all()  # a scaled-up clip's edges would be half as steep


def test_shrinking_averages_equal_blocks_and_leaves_32_pixels_alone():
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[:, ::2, ::2] = 255
    assert (shrink(frames) == 64).all()
    assert shrink(AT_32) is AT_32


@pytest.mark.parametrize("size", [0, 16, 48, -32])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="multiple of 32"):
        render(SCENES[0], size)
    with pytest.raises(InvalidValue, match=r"source\.size"):
        SourceConfig(size=size)


def test_poor_clips_have_32_pixels():
    with pytest.raises(InvalidValue, match=r"source\.severity"):
        SourceConfig(size=64, severity=0.5)
    assert PrepareConfig(source=SourceConfig(size=64)).source.size == 64


def test_a_large_world_has_large_clips_with_the_same_truth(tmp_path):
    small, large = (World(str(tmp_path / str(size)), 3, size=size) for size in (32, 64))
    for world in (small, large):
        world.open()
        world.draw([2])
    with av.open(str(large.path(2))) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == (16, 64, 64, 3)
    assert np.abs(frames.astype(int) - render(large.scene(2), 64)).mean() < 2
    told = [json.loads(world.path(2).with_suffix(".json").read_text()) for world in (small, large)]
    assert [one.pop("bytes") > 0 for one in told] == [True, True]
    assert told[0] == told[1]


def test_large_images_are_frames_of_large_clips(tmp_path):
    world = World(str(tmp_path), 0, images=True, size=64)
    world.draw([5])
    assert np.array_equal(np.asarray(Image.open(world.path(5))), render(world.scene(5), 64)[5])


@pytest.mark.parametrize(("held", "asked"), [(32, 64), (64, 32)])
def test_a_folder_of_another_size_is_refused(tmp_path, held, asked):
    World(str(tmp_path), size=held).open()
    World(str(tmp_path), size=held).open()
    with pytest.raises(StaleArtifact, match=f"size {held}"):
        World(str(tmp_path), size=asked).open()
