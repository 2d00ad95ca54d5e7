"""Measures against clips whose truth is known."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from raydistill.errors import TooFewFrames
from raydistill.evaluation import measures
from raydistill.evaluation.centroid import centroid_path, fit_motion
from raydistill.evaluation.measures import Asked
from raydistill.world import sprites


@pytest.fixture(scope="module")
def scenes():
    return [sprites.draw_scene(seed, attributes) for seed, attributes in enumerate(sprites.ALL[::5])]


@pytest.fixture(scope="module")
def clips(scenes):
    return np.stack([sprites.render(scene) for scene in scenes])


@pytest.fixture(scope="module")
def asked(scenes):
    chosen = [scene.attributes for scene in scenes]
    return Asked(
        captions=tuple(a.caption() for a in chosen),
        attributes={"shape": tuple(a.shape for a in chosen), "colour": tuple(a.colour for a in chosen)},
        heading=np.array([sprites.DIRECTIONS[a.direction] for a in chosen], dtype=np.float64),
        speed=np.array([sprites.SPEEDS[a.speed] for a in chosen]),
    )


@pytest.mark.parametrize("attribute", ["background", "shape"])
def test_centroid_is_the_shapes_centre_on_every_kind_of_clip(scenes, clips, attribute):
    error = np.linalg.norm(centroid_path(clips) - [scene.centres() for scene in scenes], axis=-1)
    kinds = np.array([getattr(scene.attributes, attribute) for scene in scenes])
    for kind in set(kinds):
        assert error[kinds == kind].mean() < 0.15
        assert error[kinds == kind].max() < 0.4


def test_centroid_withstands_blur_and_noise(scenes, clips):
    noisy = gaussian_filter(clips.astype(float), (0, 0, 1.1, 1.1, 0))
    noisy = np.clip(noisy + np.random.default_rng(0).normal(0, 8, clips.shape), 0, 255).astype(np.uint8)
    error = np.linalg.norm(centroid_path(noisy) - [scene.centres() for scene in scenes], axis=-1)
    assert error.mean() < 0.15
    assert error.max() < 0.5


def test_motion_is_the_scenes_own(scenes, clips):
    motion = fit_motion(centroid_path(clips))
    truth = np.array([scene.truth()["velocity"] for scene in scenes])
    assert np.abs(motion.velocity - truth).max() < 0.04
    assert motion.jitter.max() < 0.2


def test_true_clips_score_as_asked(clips, asked):
    path = measures.path_measures(clips, asked)
    assert path["path/direction"].all()
    assert path["path/speed_error"].max() < 0.04


def test_reversed_clips_go_the_wrong_way(clips, asked):
    path = measures.path_measures(clips[:, ::-1], asked)
    assert not path["path/direction"].any()
    assert path["path/speed_error"].min() > 0.8  # at least twice the slowest speed


def test_turned_clips_go_the_wrong_way(clips, asked):
    assert not measures.path_measures(clips.transpose(0, 1, 3, 2, 4), asked)["path/direction"].any()


def test_half_speed_is_a_speed_error_of_what_is_missing(clips, asked):
    quick = asked.speed[:, 0] > 0.8
    slow = measures.path_measures(clips[:, np.arange(16) // 2], asked)
    assert slow["path/direction"].all()
    assert slow["path/speed_error"][quick] == pytest.approx(0.45, abs=0.1)  # 1.0-1.2 becomes 0.5-0.6


def test_shaken_clips_jitter(clips, asked):
    random = np.random.default_rng(0)
    still, shaken = clips[:30], clips[:30].copy()
    for clip in shaken:
        for frame in clip:
            frame[:] = np.roll(frame, random.integers(-2, 3, size=2), axis=(0, 1))
    before, after = (fit_motion(centroid_path(x)).jitter for x in (still, shaken))
    assert (after > 1.0).all()
    assert (before < 0.2).all()


def test_a_shape_that_vanishes_costs_jitter_and_is_never_nan(clips, asked):
    gone = clips.copy()
    gone[:, 8:] = 110
    path = centroid_path(gone)
    assert (path[:, 8:] == 15.5).all()
    assert fit_motion(path).jitter.mean() > 3 * fit_motion(centroid_path(clips)).jitter.mean()
    empty = measures.path_measures(np.full_like(clips, 110), asked)
    assert not empty["path/direction"].any()
    assert empty["path/jitter"].max() == 0
    assert empty["path/speed_error"] == pytest.approx(asked.speed[:, 0])


def test_path_needs_three_frames(clips, asked):
    with pytest.raises(TooFewFrames, match="2 frames"):
        measures.path_measures(clips[:, :2], asked)


def test_blur_lowers_sharpness_step_by_step_and_noise_raises_it(clips):
    energy = [measures.gradient_energy(clips).mean()]
    for width in (0.5, 1.0, 2.0):
        blurred = gaussian_filter(clips.astype(float), (0, 0, width, width, 0)).round().astype(np.uint8)
        energy.append(measures.gradient_energy(blurred).mean())
    assert all(b < 0.9 * a for a, b in pairwise(energy))
    noisy = np.clip(clips + np.random.default_rng(0).normal(0, 15, clips.shape), 0, 255).astype(np.uint8)
    assert measures.gradient_energy(noisy).mean() > 1.1 * energy[0]


def test_gradient_energy_of_a_known_edge():
    edge = np.zeros((1, 2, 4, 4, 3), np.uint8)
    edge[..., 2:, :] = 255  # 4 of 12 horizontal differences are 1, all vertical ones 0
    assert measures.gradient_energy(edge) == pytest.approx(4 / 12)


def test_near_black_counts_frames(clips):
    dark = clips[:3].copy()
    dark[1, :4] = 3
    assert measures.near_black(dark).tolist() == [0, 0.25, 0]


def test_psnr_and_latent_rmse_of_known_distances(clips):
    other = clips[:2].copy()
    other[1] = clips[1] ^ 1  # every value off by one
    assert measures.psnr(clips[:2], other) == pytest.approx([60, 10 * np.log10(255**2)])
    latents = np.random.default_rng(0).normal(size=(2, 4, 16, 4, 4)).astype(np.float32)
    apart = measures.latent_rmse(latents, latents + np.array([0, 0.5]).reshape(2, 1, 1, 1, 1))
    assert apart == pytest.approx([0, 0.5], abs=1e-6)


def test_spread_looks_at_clips_of_the_same_caption_only():
    features = np.array([[0.0, 0], [3, 4], [100, 0], [0, 10]])
    spread = measures.spread(features, ["a", "a", "b", "a"])
    far = np.hypot(3, 6)
    assert spread == pytest.approx([(5 + 10) / 2, (5 + far) / 2, 0, (10 + far) / 2])


def test_attributes_right_compares_the_judges_words_not_its_positions(asked):
    values = {"shape": ("triangle", "circle", "square"), "colour": ("yellow", "red", "green", "blue")}
    logits = {
        name: np.array(
            [[float(value == wanted) for value in values[name]] for wanted in asked.attributes[name]]
        )
        for name in values
    }
    logits["colour"][3] = [0, 0, 0, 0.5] if asked.attributes["colour"][3] != "blue" else [1, 0, 0, 0]
    right = measures.attributes_right(logits, values, asked)
    assert right["right/shape"].all()
    assert np.flatnonzero(right["right/colour"] == 0).tolist() == [3]
    assert np.flatnonzero(right["right/all"] == 0).tolist() == [3]
