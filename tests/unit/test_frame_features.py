"""Frozen nets for single frames: the small world's own and DINOv2."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.models.codec import build_tiny_codec
from raydistill.models.frame_features import DinoFeatures, FrameNet, load_frame_features

FRAMES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_the_small_worlds_net_keeps_its_weights_and_stays_frozen(tmp_path):
    net = FrameNet({"shape": 3}, widths=(8, 16, 24, 32))
    net.save(tmp_path)
    again = load_frame_features(tmp_path)
    assert again.widths == (8, 16, 24, 32)
    x = FRAMES.clone().requires_grad_()
    maps = again(x)
    assert [m.shape for m in maps] == [(2, 256, 8), (2, 64, 16), (2, 64, 24), (2, 16, 32)]
    for ours, theirs in zip(maps, net.eval()(FRAMES), strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(m.sum() for m in maps).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training


def test_the_small_worlds_net_names_what_a_frame_shows():
    net = FrameNet({"shape": 3, "colour": 4})
    assert [m.shape for m in net(FRAMES)] == [(2, 256, 32), (2, 64, 64), (2, 64, 96), (2, 16, 128)]
    logits = net.classify(FRAMES)
    assert {name: x.shape for name, x in logits.items()} == {"shape": (2, 3), "colour": (2, 4)}
    sum(x.logsumexp(dim=1).sum() for x in logits.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_dino_gives_patch_tokens_evenly_over_its_depth_each_normed(dino):
    net = load_frame_features(dino)
    assert isinstance(net, DinoFeatures)
    assert net.after == [2, 4, 6, 8]
    maps = net(FRAMES)
    assert [m.shape for m in maps] == [(2, 4, 16)] * 4  # 32 px are brought to 28: 2 x 2 patches
    x = torch.nn.functional.interpolate(
        ((FRAMES + 1) / 2 - net.mean) / net.deviation, size=(28, 28), mode="area"
    )
    theirs = Dinov2Model.from_pretrained(dino)
    seen = theirs(pixel_values=x, output_hidden_states=True)
    torch.testing.assert_close(maps[-1], seen.last_hidden_state[:, 1:])
    for ours, block in zip(maps, (1, 3, 5, 7), strict=True):  # hidden state 0 is the embedding
        torch.testing.assert_close(ours, theirs.layernorm(seen.hidden_states[block + 1])[:, 1:])


def test_dinos_gradient_reaches_frames_alone(dino):
    net, x = load_frame_features(dino), FRAMES.clone().requires_grad_()
    sum(m.square().sum() for m in net(x)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_a_path_that_holds_no_feature_net_is_named(tmp_path, dino):
    with pytest.raises(MissingArtifact, match=r"appearance\.features names the folder of a DINOv2"):
        load_frame_features(tmp_path / "nowhere")
    FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(tmp_path / "torn")
    (tmp_path / "torn" / "features.safetensors").unlink()
    with pytest.raises(MissingArtifact, match="copy the feature net again"):
        load_frame_features(tmp_path / "torn")
    (tmp_path / "torn" / "features.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match="no whole feature net"):
        load_frame_features(tmp_path / "torn")


def without_a_block(weights):
    kept = {name: x for name, x in load_file(weights).items() if "layer.3" not in name}
    save_file(kept, weights, metadata={"format": "pt"})


def with_another_width(weights):
    save_file(load_file(weights) | {"layernorm.weight": torch.ones(8)}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda weights: weights.unlink(), MissingArtifact, "copy the DINOv2 again"),
        (lambda weights: weights.rename(weights.with_name("pytorch_model.bin")), MissingArtifact, "again"),
        (lambda weights: weights.write_bytes(b"x"), CorruptArtifact, "no whole DINOv2"),
        (with_another_width, CorruptArtifact, "no whole DINOv2"),
        (without_a_block, CorruptArtifact, r"lacks 18 weights of its DINOv2, such as encoder\.layer\.3"),
    ],
)
def test_a_dino_without_all_its_weights_is_refused(tmp_path, dino, spoil, error, says):
    folder = shutil.copytree(dino, tmp_path / "dino")
    spoil(folder / "model.safetensors")
    with pytest.raises(error, match=says):
        load_frame_features(folder)


def test_picked_frames_are_decoded_as_the_whole_clip_is():
    codec = build_tiny_codec(0, width=8)
    latents = torch.randn(2, 4, 5, 2, 2)
    picked = torch.tensor([[3, 0], [1, 4]])
    some = codec.decode_frames(latents, picked)
    whole = codec.decode(latents)
    assert codec.num_frames(5) == 5
    for i in range(2):
        torch.testing.assert_close(some[i].clamp(-1, 1), whole[i][:, picked[i]])


def test_checkpointed_decoding_has_the_same_gradient_and_is_not_clipped():
    codec = build_tiny_codec(0, width=8).requires_grad_(False)
    picked = torch.tensor([[3, 0], [1, 2]])
    gradients = []
    for checkpoint in (False, True):
        latents = torch.randn(2, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        frames = codec.decode_frames(20 * latents, picked, checkpoint=checkpoint)
        frames.square().sum().backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0][0, :, 1].abs().max() == 0  # frame 1 of clip 0 was not picked
