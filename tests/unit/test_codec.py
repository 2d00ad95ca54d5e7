"""Wan's codec in small: shapes, and latents normalised as diffusers' own pipeline does it."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from raydistill.errors import MissingArtifact
from raydistill.models.codec import ClipCodec, build_tiny_codec, load_codec

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


@pytest.fixture(scope="module")
def glaring(folder):
    """One whose frames leave [-1, 1]; larger latents would not do, as the decoder norms them."""
    codec = load_codec(folder)
    codec.autoencoder.decoder.conv_out.weight.data *= 10
    return codec


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
    assert isinstance(codec, ClipCodec)
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


def test_picked_frames_are_those_of_the_whole_clip_before_clipping(glaring):
    codec, latents = glaring, torch.randn(2, 4, 3, 2, 3, generator=torch.Generator().manual_seed(2))
    picked = torch.tensor([[8, 0], [3, 5]])
    with torch.no_grad():
        some, whole = codec.decode_frames(latents, picked), codec.decode(latents)
    assert codec.num_frames(3) == whole.shape[2] == 9
    assert some.shape == (2, 3, 2, 16, 24)
    assert some.abs().max() > 1
    for i in range(2):
        torch.testing.assert_close(some[i].clamp(-1, 1), whole[i][:, picked[i]])


def test_a_frames_gradient_goes_back_in_time_alone_and_is_the_same_checkpointed(glaring):
    gradients = []
    for checkpoint in (False, True):
        latents = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(2))
        picked = torch.tensor([[3], [8]])
        frames = glaring.decode_frames(latents.requires_grad_(), picked, checkpoint=checkpoint)
        (frames * (frames.detach().abs() > 1)).sum().backward()  # only where `decode` has no gradient
        gradients.append(latents.grad)
    torch.testing.assert_close(*gradients)
    size = gradients[0].abs().amax(dim=(1, 3, 4))
    assert size[0, 1] > 0
    assert size[0, 2] == 0  # frame 3 is the second latent frame's
    assert size[1, 2] > 0
    assert not glaring.autoencoder.decoder._forward_hooks


def test_frames_come_whole_from_a_decoder_of_patches():
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    made = AutoencoderKLWan(**sizes, **patches, latents_mean=MEAN, latents_std=DEVIATION)
    codec, latents = ClipCodec(made).eval(), torch.randn(1, 4, 2, 2, 3)
    with torch.no_grad():
        some, whole = codec.decode_frames(latents, torch.tensor([[4, 1]])), codec.decode(latents)
    torch.testing.assert_close(some.clamp(-1, 1), whole[:, :, [4, 1]])


@pytest.mark.parametrize("how", ["enable_slicing", "enable_tiling"])
def test_an_autoencoder_in_pieces_gives_no_frames_to_a_critic(folder, how):
    codec = load_codec(folder)
    getattr(codec.autoencoder, how)()
    with pytest.raises(ValueError, match="slices or tiles"):
        codec.decode_frames(torch.zeros(2, 4, 1, 2, 2), torch.zeros(2, 1, dtype=torch.long))


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
