"""Frozen nets that see single frames, for an image critic: the small world's own, and DINOv2."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from raydistill.errors import CorruptArtifact, MissingArtifact

CARD, WEIGHTS = "features.json", "features.safetensors"
LAYERS = 4
"""Maps taken from a transformer, evenly over its depth (MCM's code: after blocks 3, 6, 9 and 12 of 12)."""
LARGEST = 224
"""Side in pixels to which a transformer's input is brought (MCM's code)."""


class FrameFeatures(nn.Module):
    """Frames (n, 3, h, w) in [-1, 1] to feature maps (n, tokens, width), shallow to deep.

    Frozen; the gradient reaches the frames.
    """

    widths: tuple[int, ...]
    """Of each map."""


class FrameNet(FrameFeatures):
    """A small convolutional net, trained on the small world's frames to say what they show."""

    def __init__(self, heads: Mapping[str, int], widths: tuple[int, ...] = (32, 64, 96, 128)):
        """`heads`: for each attribute, how many values; each width after the first halves the frame."""
        super().__init__()
        self.widths, self.values = tuple(widths), dict(heads)
        stages = [_stage(3, widths[0], 2)]
        stages += [_stage(a, b, 2 if k != 1 else 1) for k, (a, b) in enumerate(pairwise(widths))]
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], count) for name, count in heads.items()})

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Token maps of every stage."""
        maps, x = list[Tensor](), frames
        for stage in self.stages:
            x = stage(x)
            maps.append(x.flatten(2).transpose(1, 2))
        return maps

    def classify(self, frames: Tensor) -> dict[str, Tensor]:
        """Logits per attribute."""
        seen = self(frames)[-1].mean(dim=1)
        return {name: head(seen) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Write the card and safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        made = {"heads": self.values, "widths": self.widths}
        (folder / CARD).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    """Two convolutions, the first with the stride."""
    layers: list[nn.Module] = []
    for a, step in ((channels, stride), (width, 1)):
        layers += [nn.Conv2d(a, width, 3, stride=step, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
    return nn.Sequential(*layers)


class DinoFeatures(FrameFeatures):
    """Patch tokens of a DINOv2 after blocks evenly over its depth, through its last norm (MCM's code)."""

    def __init__(self, network: Dinov2Model):
        """Wrap, without copying."""
        super().__init__()
        self.network = network
        depth = cast(int, network.config.num_hidden_layers)
        self.after = [round((k + 1) * depth / LAYERS) for k in range(LAYERS)]
        self.widths = (cast(int, network.config.hidden_size),) * LAYERS
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Bring frames to a multiple of the patch size, LARGEST at most, then through the net.

        MCM's code crops larger frames by one coin per batch, which would hang on how batches are divided.
        """
        patch = cast(int, self.network.config.patch_size)
        size = [max(patch, min(LARGEST, side) // patch * patch) for side in frames.shape[2:]]
        x = ((frames + 1) / 2 - self.mean) / self.deviation
        x = F.interpolate(x, size=size, mode="area")
        hidden = self.network(pixel_values=x, output_hidden_states=True).hidden_states
        return [self.network.layernorm(hidden[k])[:, 1:] for k in self.after]


def load_frame_features(path: str | Path, *, weights: bool = True) -> FrameFeatures:
    """Load a feature net, safetensors only, frozen; without `weights` it is made of its config, for counting.

    Raises MissingArtifact, CorruptArtifact.
    """
    folder = Path(path)
    if (folder / CARD).is_file():
        return _load_own(folder, weights=weights).eval().requires_grad_(False)
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        kind = repr(error)
    if kind != "dinov2":
        raise MissingArtifact(
            f"no feature net at {folder}: appearance.features names the folder of a DINOv2 of transformers "
            f"(config.json, model.safetensors), or of what jobs/pretrain.py part=features made; found {kind}"
        )
    network = _load_dino(folder) if weights else Dinov2Model(Dinov2Config.from_pretrained(folder))
    return DinoFeatures(network).eval().requires_grad_(False)


def _load_dino(folder: Path) -> Dinov2Model:
    try:
        loaded = Dinov2Model.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError as gone:
        raise MissingArtifact(f"{folder} has no model.safetensors: copy the DINOv2 again ({gone})") from gone
    except (ValueError, RuntimeError, SafetensorError) as broken:
        raise CorruptArtifact(f"{folder} holds no whole DINOv2: {broken}") from broken
    network, found = cast(tuple[Dinov2Model, dict[str, Any]], loaded)
    if lacking := sorted(found["missing_keys"]):  # transformers draws them at random and goes on
        raise CorruptArtifact(f"{folder} lacks {len(lacking)} weights of its DINOv2, such as {lacking[0]}")
    return network


def _load_own(folder: Path, *, weights: bool) -> FrameNet:
    try:
        made: dict[str, Any] = json.loads((folder / CARD).read_bytes())
        net = FrameNet(made["heads"], tuple(made["widths"]))
        if weights:
            net.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError as gone:
        raise MissingArtifact(f"{folder} has no {WEIGHTS}: copy the feature net again") from gone
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as broken:
        raise CorruptArtifact(f"{folder} holds no whole feature net: {broken}") from broken
    return net
