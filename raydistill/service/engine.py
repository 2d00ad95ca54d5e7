"""A loaded bundle: the three stages of making a video, one call each, with no state between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from raydistill.config.serve import WorkerConfig
from raydistill.errors import StaleArtifact
from raydistill.models.codec import load_codec
from raydistill.models.prompts import PRECISIONS, PromptEncoder
from raydistill.models.protocols import TextEncoder
from raydistill.models.text import WORD_VECTORS, WordVectors
from raydistill.sampler import SamplingPlan, keyed_noise, take_step
from raydistill.service.bundle import TEXT, BundleCard, read_bundle, verify_bundle
from raydistill.student import load_student
from raydistill.types import Latents, Text


class Engine:
    """Networks of one bundle on one device.

    Both experts are one base and a branch over it unless `config.merge` folds them apart. Each video is made
    alone, in a batch of one: its latents depend on nothing but its request, to the last bit.
    """

    def __init__(self, folder: str | Path, config: WorkerConfig):
        """Verify all files of the bundle, then load it. Raises what `verify_bundle` raises, StaleArtifact."""
        folder, self.config = Path(folder), config
        self.card = read_bundle(folder)
        verify_bundle(folder)
        if config.previews == "linear" and self.card.preview is None:
            raise StaleArtifact(
                f"{folder} has no linear map for previews: worker.previews=codec, or export again"
            )
        self.student = load_student(
            folder / "student",
            folder / "teacher" if self.card.has_teacher else None,
            merged=config.merge,
            device=config.device,
            dtype=PRECISIONS[config.precision],
        )
        self.student.require_codec(folder / "codec")
        self.codec = load_codec(folder / "codec").to(config.device)
        self.text = _text(folder, self.card, config.device)
        self.plans = {name: SamplingPlan.from_dict(plan.to_dict()) for name, plan in self.card.plans.items()}
        for name, plan in self.plans.items():
            of_teacher = all(one.expert == "teacher" for one in plan.jumps)  # not among the student's own
            if not of_teacher and self.student.plan(name) != plan:
                raise StaleArtifact(
                    f"{folder}: its card and its student differ in plan '{name}': export again"
                )

    def encode(self, prompt: str) -> Text:
        """Embed one prompt, (1, l, d)."""
        return self.text([prompt])

    def noise(self, request: Mapping[str, Any]) -> Latents:
        """Where sampling starts: float32 (1, c, f, h, w), a function of the seed alone."""
        return self._noise_at(request)(0, (1, *request["latent"]))

    def _noise_at(self, request: Mapping[str, Any]) -> Any:
        return keyed_noise(request["seed"], torch.zeros(1, dtype=torch.int64))

    def num_passes(self, plan: str, i: int) -> int:
        """Network passes of step i: two for a guided teacher's."""
        return 2 if self.plans[plan].jumps[i].expert == "teacher" else 1

    def expert(self, plan: str, i: int) -> str:
        """Who takes step i."""
        return self.plans[plan].jumps[i].expert

    def step(self, request: Mapping[str, Any], i: int, x: Latents, text: Text) -> tuple[Latents, Latents]:
        """Take step i from x: the state after it and the predicted clean latents, both on the CPU."""
        device = self.config.device
        after, x0 = take_step(
            self.student.fields,
            self.student.schedule,
            self.plans[request["plan"]],
            i,
            x.to(device),
            text.to(device),
            noise_at=self._noise_at(request),
        )
        return after.cpu(), x0.cpu()

    @torch.no_grad()
    def decode(self, latents: Latents) -> np.ndarray:
        """Clean latents (1, c, f, h, w) to frames, uint8 (f, h, w, 3)."""
        frames = self.codec.decode(latents.to(self.config.device))
        return _pixels(rearrange(frames[0], "c f h w -> f h w c"))

    @torch.no_grad()
    def preview(self, x0: Latents) -> np.ndarray | None:
        """A frame from the middle of the predicted clip, uint8 (h, w, 3); None if previews are off."""
        if self.config.previews == "off":
            return None
        if self.config.previews == "codec":
            middle = torch.tensor([[self.codec.num_frames(x0.shape[2]) // 2]])
            frame = self.codec.decode_frames(x0.to(self.config.device), middle)
            return _pixels(rearrange(frame[0, :, 0], "c h w -> h w c"))
        assert self.card.preview is not None
        matrix, bias = (torch.tensor(self.card.preview[name]) for name in ("matrix", "bias"))
        return _pixels(rearrange(x0[0, :, x0.shape[2] // 2], "c h w -> h w c") @ matrix + bias)


def _text(folder: Path, card: BundleCard, device: str) -> TextEncoder:
    """Load what embeds prompts. Raises MissingArtifact."""
    about = card.text
    if about["kind"] == WORD_VECTORS:
        return WordVectors(about["num_tokens"], about["width"])
    return PromptEncoder(folder / TEXT, about["length"], about["precision"], device=device)


def _pixels(values: Tensor) -> np.ndarray:
    """[-1, 1] to 0 .. 255."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
