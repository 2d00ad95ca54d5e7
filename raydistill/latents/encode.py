"""Clips and captions to latents and text embeddings, in batches of equal shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill.artifacts import file_sha256, fingerprint
from raydistill.config.prepare import ClipConfig
from raydistill.errors import InvalidValue, MissingArtifact
from raydistill.models.codec_config import compression, read_codec, statistics
from raydistill.models.folders import files_of, part_folder
from raydistill.models.protocols import TextEncoder

NORMALISATION = "frames / 127.5 - 1; latents by the codec's own mean and deviation"


class Encoder:
    """A codec and a text encoder on one device."""

    def __init__(
        self,
        codec: str | Path,
        *,
        text: TextEncoder,
        batch_size: int,
        dtype: str = "float32",
        device: str = "cpu",
    ):
        """Load the codec. `dtype` is that of the stored latents."""
        from raydistill.models.codec import load_codec  # seconds of diffusers, which the driver does not need

        self.codec = load_codec(codec).to(device)
        self.text, self.batch_size, self.dtype, self.device = text, batch_size, np.dtype(dtype), device

    @torch.inference_mode()
    def __call__(
        self, clips: Sequence[np.ndarray], captions: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode uint8 clips (f, h, w, 3): per clip latents (c, f', h', w') and text (l, d).

        The batches depend on the order of the clips alone, so the same clips give the same bits.
        """
        size = self.batch_size
        parts = [self.text(captions[at : at + size]) for at in range(0, len(captions), size)]
        text = torch.cat(parts).numpy() if parts else ()
        latents: list[np.ndarray] = []
        start = 0
        while start < len(clips):
            end = start + 1
            while end < min(start + self.batch_size, len(clips)) and clips[end].shape == clips[start].shape:
                end += 1
            z = self.codec.encode(frames_to_tensor(clips[start:end]).to(self.device))
            latents.extend(z.float().cpu().numpy().astype(self.dtype))
            start = end
        return list(zip(latents, text, strict=True))


def frames_to_tensor(clips: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 clips (f, h, w, 3) into float32 (b, 3, f, h, w) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(clips))
    return stacked.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def models_identity(codec: str | Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands for the models in a fingerprint: the contents of every file, not where they lie.

    `text`: the text encoder's own identity.
    """
    kind, _ = _known_codec(codec)
    folder = part_folder(codec, "vae")
    files = {name: file_sha256(folder / name) for name in files_of(folder)}
    return {
        "codec": {"kind": kind, "digest": fingerprint(files), "files": files},
        "text": dict(text),
    }


def require_codec(codec: str | Path, clip: ClipConfig, *, images: bool = False) -> None:
    """Check that a folder holds a codec that `load_codec` knows, and clips against its compression.

    From its config alone, before anything is started. Raises MissingArtifact, InvalidValue.
    """
    kind, config = _known_codec(codec)
    temporal, space = compression(kind, config)
    if kind != "AutoencoderTiny" and (kind != "AutoencoderKLWan" or "latents_std" in config):
        statistics(kind, config)
    if not images and temporal > 1:
        _require_length(temporal, clip.num_frames)
    for name in ("height", "width"):
        if getattr(clip, name) % space:
            raise InvalidValue(f"clip.{name}", getattr(clip, name), f"a multiple of {space} for this codec")


def _known_codec(codec: str | Path) -> tuple[str, Mapping[str, Any]]:
    """Return class and config of a codec. Raises MissingArtifact, naming the setting."""
    try:
        return read_codec(part_folder(codec, "vae"))
    except MissingArtifact as error:
        raise MissingArtifact(f"encode.codec: {error}") from error


def _require_length(factor: int, num_frames: int) -> None:
    if (num_frames - 1) % factor:
        near = (num_frames - 1) // factor * factor + 1
        expected = f"1 more than a multiple of {factor}, e.g. {near}: this codec compresses time by {factor}"
        raise InvalidValue("clip.num_frames", num_frames, expected)
