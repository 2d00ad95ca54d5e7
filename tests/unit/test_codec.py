"""Wan's codec in small: shapes, and latents normalised as diffusers' own pipeline does it."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from raydistill.errors import MissingArtifact
from raydistill.models.codec import WanCodec, build_tiny_codec, load_codec

BROKEN = {
    "nothing": (None, None, "expected the folder of a diffusers autoencoder"),
    "torn config": ('{"_class', None, "expected the folder of a diffusers autoencoder"),
    "no class": ("{}", None, "expected the folder of a diffusers autoencoder"),
    "another class": ('{"_class_name": "UNet2DModel"}', None, "UNet2DModel: known codecs are"),
    "no scaling": (..., None, "no latents.json"),
    "torn scaling": (..., '{"mean": [0', 'with "mean" and "deviation"'),
    "half a scaling": (..., '{"mean": [0, 0, 0, 0]}', 'with "mean" and "deviation"'),
    "a list": (..., "[]", 'with "mean" and "deviation"'),
}
"""config.json (... for what was saved), latents.json, and what the error says."""
MEAN, DEVIATION = [0.1, -0.2, 0.3, 0.05], [0.5, 2.0, 1.5, 0.8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    down = {"temperal_downsample": [False, True, True]}
    made = AutoencoderKLWan(**sizes, **down, latents_mean=MEAN, latents_std=DEVIATION)
    path = tmp_path_factory.mktemp("codec")
    made.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def codec(folder):
    return load_codec(folder)


@pytest.mark.parametrize("k", [0, 1, 2])
@torch.no_grad()
def test_4k_plus_1_frames_become_k_plus_1_latents_and_come_back(codec, k):
    frames = torch.rand(2, 3, 4 * k + 1, 16, 24, generator=torch.Generator().manual_seed(k)) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (2, 4, k + 1, 2, 3)
    back = codec.decode(latents)
    assert back.shape == frames.shape
    assert back.abs().max() <= 1


@torch.no_grad()
def test_latents_are_normalised_as_in_wan_pipeline(codec, folder):
    assert isinstance(codec, WanCodec)
    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    frames = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # As it stands in WanPipeline and its image-to-video brother, where `latents_std` is the reciprocal.
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    reciprocal = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    expected = (vae.encode(frames).latent_dist.mode() - mean) * reciprocal
    latents = codec.encode(frames)
    torch.testing.assert_close(latents, expected)
    assert not torch.allclose(latents, vae.encode(frames).latent_dist.mode())
    video = vae.decode(expected / reciprocal + mean, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), video)


@torch.no_grad()
def test_a_sample_is_encoded_alike_in_any_batch(codec):
    # The autoencoder keeps frames between calls, to work in chunks: they must not leak.
    frames = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = torch.cat([codec.encode(one[None]) for one in frames])
    torch.testing.assert_close(codec.encode(frames), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_no_codec_is_named(tmp_path, case):
    settings, scaling, says = BROKEN[case]
    build_tiny_codec(0, width=8).save(tmp_path)
    for name, text in (("config.json", settings), ("latents.json", scaling)):
        (tmp_path / name).unlink() if text is None else None
        if isinstance(text, str):
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MissingArtifact, match=says) as refused:
        load_codec(tmp_path)
    assert str(tmp_path) in str(refused.value)
