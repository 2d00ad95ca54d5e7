"""One vector a frame, and of a whole CLIP one a caption in the same space: for figures of real clips."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.models.frame_features import CARD, FrameFeatures, load_frame_features

CLIPS: dict[str, Any] = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection}
TOKENIZERS = ("tokenizer.json", "vocab.json")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of colours, as every CLIP was trained with (its released code)."""


class FrameEmbedding(nn.Module):
    """Frames (n, 3, h, w) in [-1, 1] to vectors (n, d); frozen."""

    speaks = False
    """Whether captions have vectors too."""


class ClipEmbedding(FrameEmbedding):
    """A CLIP of transformers, projected into the space that it shares with captions."""

    def __init__(self, network: Any, tokenizer: Callable[..., Any] | None):
        """Wrap, without copying; no `tokenizer`: frames alone."""
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.speaks = tokenizer is not None
        about = getattr(network.config, "vision_config", network.config)
        self.size = int(about.image_size)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))

    def prepare(self, frames: Tensor) -> Tensor:
        """Short side to the network's size, middle cut out, colours normalised: as CLIP's own code does."""
        h, w = frames.shape[2:]
        short = min(h, w)
        size = [h * self.size // short, w * self.size // short]
        x = F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((side - self.size) // 2 for side in size)
        x = x[:, :, top : top + self.size, left : left + self.size]
        return ((x + 1) / 2 - self.mean) / self.deviation

    def forward(self, frames: Tensor) -> Tensor:
        """Vectors of frames, not normalised."""
        seen = self.network.vision_model(pixel_values=self.prepare(frames)).pooler_output
        return self.network.visual_projection(seen)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Vectors of captions, (n, d); what is longer than the network takes is cut off.

        Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("no tokenizer was given")
        most = self.network.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        told = self.tokenizer(list(captions), **how)
        device = self.mean.device
        ids, mask = (told[name].to(device) for name in ("input_ids", "attention_mask"))
        said = self.network.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.network.text_projection(said)


class MapEmbedding(FrameEmbedding):
    """The mean over a frame of the last map of a `FrameFeatures`."""

    def __init__(self, network: FrameFeatures):
        """Wrap, without copying."""
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Vectors of frames."""
        return self.network(frames)[-1].mean(dim=1)


def load_embedding(path: str | Path) -> FrameEmbedding:
    """Load a network from a local folder, safetensors only, frozen; nothing is ever downloaded.

    A CLIP or its vision part as transformers saves them, or what `load_frame_features` knows. Raises
    MissingArtifact, CorruptArtifact.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingArtifact(f"no folder {folder.absolute()}: copy the network for features there")
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        kind = repr(error)
    if kind not in CLIPS:
        if kind != "dinov2" and not (folder / CARD).is_file():
            known = ", ".join((*CLIPS, "dinov2"))
            raise MissingArtifact(
                f"no network for features at {folder}: its config.json must be of {known}; found {kind}"
            )
        return MapEmbedding(load_frame_features(folder)).eval().requires_grad_(False)
    network = _load_clip(folder, kind)
    tokenizer = None
    if kind == "clip" and any((folder / name).is_file() for name in TOKENIZERS):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as broken:
            raise CorruptArtifact(f"{folder} holds no whole tokenizer: {broken}") from broken
    return ClipEmbedding(network, tokenizer).eval().requires_grad_(False)


def _load_clip(folder: Path, kind: str) -> Any:
    try:
        network, found = CLIPS[kind].from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError as gone:
        raise MissingArtifact(f"{folder} has no model.safetensors: copy the CLIP again ({gone})") from gone
    except (ValueError, RuntimeError, SafetensorError) as broken:
        raise CorruptArtifact(f"{folder} holds no whole CLIP: {broken}") from broken
    if lacking := sorted(found["missing_keys"]):  # transformers draws them at random and goes on
        raise CorruptArtifact(f"{folder} lacks {len(lacking)} weights of its CLIP, such as {lacking[0]}")
    return network
