"""Measures of how frames look, on drawn clips and on what the field makes of them."""

import numpy as np
import pytest

from raydistill.evaluation.appearance import (
    Sign,
    black_clip,
    log_spectrum,
    saturation,
    spectral_distance,
    watermark,
)
from raydistill.world.degrade import GLYPH, OPACITY, degrade, watermark_box
from raydistill.world.sprites import SIZE, draw_scene, render

SIGN = Sign(GLYPH, *watermark_box(SIZE, SIZE), OPACITY)
CLEAN = np.stack([render(draw_scene(i)) for i in range(12)])
OTHERS = np.stack([render(draw_scene(1000 + i)) for i in range(12)])


def poor(severity):
    return np.stack([degrade(clip, severity, i) for i, clip in enumerate(CLEAN)])


def test_the_sign_is_read_off_its_pixels_by_hand():
    frames = np.full((2, 3, SIZE, SIZE, 3), 100, np.uint8)
    box = frames[1, :, SIGN.rows, SIGN.columns]
    box[:, GLYPH] = round(100 + 0.5 * OPACITY * 155)
    none, half = watermark(frames, SIGN)
    assert none == 0
    assert half == pytest.approx(0.5, abs=0.02)


def test_the_sign_grows_with_severity_and_is_not_in_clean_clips():
    means = [watermark(frames, SIGN).mean() for frames in (CLEAN, poor(0.5), poor(1.0))]
    assert means[0] < 0.1
    assert 0.3 < means[1] < 0.6
    assert 0.7 < means[2] < 1.1


def test_the_spectrum_is_nearest_to_real_clips_for_real_clips():
    real = log_spectrum(OTHERS).mean(axis=0)
    far = [spectral_distance(frames, real).mean() for frames in (CLEAN, poor(0.5), poor(1.0))]
    assert far[0] < far[1]
    assert far[0] < far[2]


def test_a_waves_power_is_at_its_frequency():
    x = np.arange(SIZE)
    wave = 127.5 + 100 * np.sin(2 * np.pi * 5 * x / SIZE)
    frames = np.broadcast_to(wave[None, None, None, :, None], (1, 2, SIZE, SIZE, 3)).astype(np.uint8)
    assert int(log_spectrum(frames)[0].argmax()) + 1 == 5


def test_saturation_by_hand():
    grey, red = np.full((1, 2, 4, 4, 3), 90, np.uint8), np.zeros((1, 2, 4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert saturation(np.concatenate([grey, red])).tolist() == [0.0, 1.0]


def test_a_clip_is_black_only_if_all_its_frames_are():
    frames = np.zeros((2, 3, 4, 4, 3), np.uint8)
    frames[1, 2] = 200
    assert black_clip(frames).tolist() == [1.0, 0.0]
