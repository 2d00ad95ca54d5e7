"""A small frozen network that reads the small world's attributes off a clip."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raydistill.errors import MissingArtifact


class Judge(nn.Module):
    """Frames of a clip, stacked as channels, through a plain convolutional net; one head per attribute."""

    def __init__(self, attributes: Mapping[str, tuple[str, ...]], num_frames: int = 16, width: int = 48):
        """Take attribute names with their values; clips must have `num_frames` frames of 32x32."""
        super().__init__()
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.num_frames, self.width = num_frames, width
        widths = (3 * num_frames, width, 2 * width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1] * 16, len(values)) for name, values in self.attributes.items()}
        )

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Logits per attribute from frames (b, 3, f, h, w), float in [-1, 1] or uint8."""
        if frames.dtype == torch.uint8:
            frames = frames.float() / 127.5 - 1
        hidden = self.trunk(rearrange(frames, "b c f h w -> b (f c) h w")).flatten(1)
        return {name: head(hidden) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Write judge.safetensors and judge.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        made = {"attributes": self.attributes, "num_frames": self.num_frames, "width": self.width}
        (folder / "judge.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def load_judge(path: str | Path) -> Judge:
    """Load a judge folder; raises MissingArtifact when there is none."""
    folder = Path(path)
    if not (folder / "judge.json").is_file():
        raise MissingArtifact(f"no judge at {folder}: jobs/pretrain.py part=judge makes one")
    judge = Judge(**json.loads((folder / "judge.json").read_text(encoding="utf-8")))
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval().requires_grad_(False)
