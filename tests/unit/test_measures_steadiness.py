"""Motion and flicker of clips whose figures are known by hand."""

import numpy as np
import pytest

from raydistill.errors import TooFewFrames
from raydistill.evaluation.steadiness import flicker, motion

NOISE = np.random.default_rng(0).normal(128, 20, (2, 40, 24, 24, 3)).clip(0, 255).astype(np.uint8)


def clips(*brightness):
    """Flat clips of these brightnesses, one after the other."""
    return np.broadcast_to(
        np.array(brightness, np.uint8)[:, :, None, None, None], (*np.shape(brightness), 4, 5, 3)
    )


def test_motion_by_hand():
    """A clip that grows by 10 a frame, one that falls (bytes must not wrap), a still one."""
    found = motion(clips([0, 10, 20, 30], [200, 100, 50, 0], [9, 9, 9, 9]))
    assert found == pytest.approx([10 / 255, 200 / 3 / 255, 0])


def test_flicker_by_hand():
    """Even change, two pictures in turn, one jump, none at all."""
    found = flicker(clips([0, 10, 20, 30, 40], [0, 9, 0, 9, 0], [0, 0, 12, 12, 12], [7, 7, 7, 7, 7]))
    assert found == pytest.approx([0, 2, (2 * 12 / 3) / (12 / 4), 0])


def test_flicker_of_independent_noise_is_the_root_of_three():
    assert flicker(NOISE) == pytest.approx(3**0.5, rel=0.02)


def test_each_clip_has_its_own_figure():
    ramp = np.broadcast_to(clips(range(40))[:, :, :1, :1], (1, *NOISE.shape[1:]))
    together = np.concatenate([NOISE, ramp])
    for measure in (motion, flicker):
        alone = [measure(together[i : i + 1])[0] for i in range(3)]
        assert measure(together) == pytest.approx(alone)
        assert len(set(alone)) == 3


def test_too_few_frames_are_refused():
    with pytest.raises(TooFewFrames, match="motion wants clips of 2"):
        motion(NOISE[:, :1])
    with pytest.raises(TooFewFrames, match="flicker wants clips of 3"):
        flicker(NOISE[:, :2])
