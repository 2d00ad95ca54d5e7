"""Poor clips of the field: what severity does to a clip, and what it leaves alone."""

import json

import numpy as np
import pytest
from PIL import Image

from raydistill.errors import StaleArtifact
from raydistill.evaluation.centroid import centroid_path
from raydistill.world.degrade import GLYPH, degrade, watermark_box
from raydistill.world.drawing import World
from raydistill.world.sprites import Attributes, draw_scene, held_out, render

CLIPS = np.stack([render(draw_scene(i)) for i in range(6)])


def gradient_energy(frames):
    return np.square(np.diff(frames.astype(float), axis=-2)).mean()


def test_severity_0_changes_no_byte():
    assert np.array_equal(degrade(CLIPS[0], 0.0, 3), CLIPS[0])


def test_a_clip_is_degraded_the_same_way_every_time_and_another_otherwise():
    assert np.array_equal(degrade(CLIPS[0], 0.7, 3), degrade(CLIPS[0], 0.7, 3))
    assert not np.array_equal(degrade(CLIPS[0], 0.7, 3), degrade(CLIPS[0], 0.7, 4))


def test_more_severity_is_less_sharp():
    sharp = [gradient_energy(np.stack([degrade(c, s, 1) for c in CLIPS])) for s in (0, 0.5, 1)]
    assert sharp[0] > 1.3 * sharp[1] > 1.3 * sharp[2]


def test_the_watermark_is_brighter_than_its_surroundings_in_one_place():
    rows, columns = watermark_box(32, 32)
    box = np.stack([degrade(c, 1.0, i) for i, c in enumerate(CLIPS)])[:, :, rows, columns].astype(float)
    assert box[..., GLYPH, :].mean() > box[..., ~GLYPH, :].mean() + 30
    clean = CLIPS[:, :, rows, columns].astype(float)
    assert abs(clean[..., GLYPH, :].mean() - clean[..., ~GLYPH, :].mean()) < 10


def test_motion_is_left_alone():
    poor = np.stack([degrade(c, 1.0, i) for i, c in enumerate(CLIPS)])
    moved = [np.diff(centroid_path(x), axis=1).mean(axis=1) for x in (CLIPS, poor)]
    assert np.abs(moved[0] - moved[1]).max() < 0.25  # px per frame; the slowest moves 0.45


@pytest.mark.parametrize("severity", [-0.1, 1.1, float("nan")])
def test_severity_outside_its_range_is_refused(severity):
    with pytest.raises(ValueError, match="must be in"):
        degrade(CLIPS[0], severity, 0)


def test_images_are_single_frames_of_other_scenes_with_captions_of_their_own(tmp_path):
    world = World(str(tmp_path), 2, images=True)
    world.draw([0, 5])
    assert {p.name for p in tmp_path.iterdir()} == {
        f"image_{n:06d}{suffix}" for n in (0, 5) for suffix in (".png", ".json")
    }
    scene = world.scene(5)
    assert scene != World(str(tmp_path), 2).scene(5)
    assert not held_out(scene.attributes)
    assert np.array_equal(np.asarray(Image.open(world.path(5))), render(scene)[5])
    sidecar = json.loads(world.path(5).with_suffix(".json").read_text())
    assert sidecar["caption"] == scene.attributes.image_caption()
    with pytest.raises(ValueError, match="not a caption"):
        Attributes.parse(sidecar["caption"])
    assert world.finished(7) == {0, 5}


def test_a_poor_world_is_another_world(tmp_path):
    World(str(tmp_path), 0).open()
    with pytest.raises(StaleArtifact, match="severity 0"):
        World(str(tmp_path), 0, severity=0.5).open()
