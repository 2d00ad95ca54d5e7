"""Networks for figures from a local folder: CLIP whole and in part, DINOv2, the small world's own."""

import shutil

import numpy as np
import pytest
import torch
from evaluate_real_cases import write_clip
from pipeline_cases import tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.models.frame_embedding import load_embedding
from raydistill.models.frame_features import FrameNet, load_frame_features

PIXELS = np.random.default_rng(0).integers(80, 176, (3, 40, 60, 3), np.uint8)
FRAMES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1
CAPTIONS = (
    "a red square",
    "the blue circle moves left over the plain red square slowly right over the plain",
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS.swapaxes(1, 2), PIXELS[:, :16, :20]])
def test_frames_are_prepared_as_clips_own_code_does(clip, pixels):
    """Which rounds to bytes after each side."""
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    wanted = theirs(list(pixels), return_tensors="pt")["pixel_values"]
    frames = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (load_embedding(clip).prepare(frames) - wanted).abs().max() < 2 / 255 / 0.26


def test_vectors_are_those_of_transformers(clip):
    ours, theirs = load_embedding(clip), CLIPModel.from_pretrained(clip).eval()
    x = ours.prepare(FRAMES)
    torch.testing.assert_close(ours(FRAMES), theirs.get_image_features(x).pooler_output)
    assert not any(p.requires_grad for p in ours.parameters())
    said = tokenizer(12)(list(CAPTIONS), padding=True, truncation=True, max_length=12, return_tensors="pt")
    assert said["input_ids"].shape[1] == 12  # the longer one was cut
    wanted = theirs.get_text_features(said["input_ids"], said["attention_mask"]).pooler_output
    torch.testing.assert_close(ours.embed_captions(CAPTIONS), wanted)


def test_a_captions_vector_does_not_depend_on_its_neighbours(clip):
    ours = load_embedding(clip)
    torch.testing.assert_close(ours.embed_captions(CAPTIONS)[:1], ours.embed_captions(CAPTIONS[:1]))


def test_a_vision_part_and_a_clip_without_tokenizer_do_not_speak(clip, tmp_path):
    whole = load_embedding(clip)
    assert whole.speaks
    about = CLIPVisionConfig(**{**whole.network.config.vision_config.to_dict(), "projection_dim": 3})
    vision = CLIPVisionModelWithProjection(about)
    vision.load_state_dict(
        {n: x for n, x in whole.network.state_dict().items() if n.startswith("vi")}
    )  # vision_model, visual_projection
    vision.save_pretrained(tmp_path / "vision")
    mute = shutil.copytree(clip, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    for folder in (tmp_path / "vision", mute):
        part = load_embedding(folder)
        assert not part.speaks
        torch.testing.assert_close(part(FRAMES), whole(FRAMES))
        with pytest.raises(ValueError, match="no tokenizer"):
            part.embed_captions(CAPTIONS)


def test_other_nets_give_the_mean_of_their_last_map(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dino")
    FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(tmp_path / "own")
    for name, width in (("dino", 16), ("own", 8)):
        vectors = load_embedding(tmp_path / name)(FRAMES)
        assert vectors.shape == (3, width)
        last = load_frame_features(tmp_path / name)(FRAMES)[-1]
        torch.testing.assert_close(vectors, torch.stack([one.mean(dim=0) for one in last]))


def test_what_is_not_whole_is_refused(clip, tmp_path):
    with pytest.raises(MissingArtifact, match=r"no folder .*nowhere"):
        load_embedding(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MissingArtifact, match=r"clip, clip_vision_model, dinov2; found bert"):
        load_embedding(tmp_path / "other")
    broken = shutil.copytree(clip, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    lost = next(name for name in weights if "visual_projection" in name)
    save_file({n: x for n, x in weights.items() if n != lost}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"lacks 1 weights .*visual_projection"):
        load_embedding(broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptArtifact, match="no whole CLIP"):
        load_embedding(broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")  # pickled weights are never read
    with pytest.raises(MissingArtifact, match=r"no model\.safetensors"):
        load_embedding(broken)
