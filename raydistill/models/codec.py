"""Video codecs: diffusers autoencoders behind `VideoCodec`, with the latents normalised per channel."""

import json
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from raydistill.errors import MissingArtifact
from raydistill.models.codec_config import KINDS, read_codec, statistics
from raydistill.models.folders import part_folder
from raydistill.types import Latents

SCALING = "latents.json"


class FrameCodec(nn.Module):
    """Frame by frame, 8x down in space, none in time: `AutoencoderTiny`, or `AutoencoderKL` by its mode."""

    def __init__(
        self, autoencoder: AutoencoderTiny | AutoencoderKL, mean: list[float], deviation: list[float]
    ):
        """Normalise each latent channel by this mean and deviation."""
        super().__init__()
        self.autoencoder: Any = autoencoder
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, -1, 1, 1, 1))

    def encode(self, frames: Tensor) -> Latents:
        """(b, 3, f, h, w) in [-1, 1] to (b, c, f, h/8, w/8)."""
        z = self.autoencoder.encode(rearrange(frames, "b c f h w -> (b f) c h w"), return_dict=False)[0]
        z = z if isinstance(z, Tensor) else z.mode()
        return (rearrange(z, "(b f) c h w -> b c f h w", b=len(frames)) - self.mean) / self.deviation

    def decode(self, latents: Latents) -> Tensor:
        """Inverse shapes of `encode`; clipped to [-1, 1]."""
        z = rearrange(latents * self.deviation + self.mean, "b c f h w -> (b f) c h w")
        frames = cast(Tensor, self.autoencoder.decode(z, return_dict=False)[0])
        return rearrange(frames, "(b f) c h w -> b c f h w", b=len(latents)).clamp(-1, 1)

    def num_frames(self, latent_frames: int) -> int:
        """One frame for each latent frame."""
        return latent_frames

    def decode_frames(
        self, latents: Latents, picked: Int[Tensor, "b k"], *, checkpoint: bool = False
    ) -> Tensor:
        """Decode k frames of each clip by number, (b, 3, k, h, w), with gradient and not clipped."""
        which = torch.arange(len(latents), device=latents.device)[:, None]
        chosen = (latents * self.deviation + self.mean).transpose(1, 2)[which, picked]
        frames = _through(self._decode_frames, chosen.flatten(0, 1), checkpoint)
        return rearrange(frames, "(b k) c h w -> b c k h w", b=len(latents))

    def _decode_frames(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.autoencoder.decode(z, return_dict=False)[0])

    def save(self, folder: Path) -> None:
        """Write the diffusers folder and the normalisation beside it."""
        self.autoencoder.save_pretrained(folder, safe_serialization=True)
        scaling = {"mean": self.mean.flatten().tolist(), "deviation": self.deviation.flatten().tolist()}
        (Path(folder) / SCALING).write_text(json.dumps(scaling, indent=1) + "\n", encoding="utf-8")


class ClipCodec(nn.Module):
    """8x down in space, 4x in time after the first frame, by the posterior's mode.

    Wan's, HunyuanVideo's or CogVideoX's autoencoder.
    """

    def __init__(self, autoencoder: AutoencoderKLWan | AutoencoderKLHunyuanVideo | AutoencoderKLCogVideoX):
        """Take the normalisation from the autoencoder's own config. Raises InvalidValue if it has none."""
        super().__init__()
        self.autoencoder = autoencoder
        mean, deviation = statistics(type(autoencoder).__name__, autoencoder.config)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, -1, 1, 1, 1))

    def encode(self, frames: Tensor) -> Latents:
        """(b, 3, 4k+1, h, w) in [-1, 1] to (b, c, k+1, h/8, w/8)."""
        return (self.autoencoder.encode(frames, return_dict=False)[0].mode() - self.mean) / self.deviation

    def decode(self, latents: Latents) -> Tensor:
        """Latents to frames, as many as `num_frames` says; clipped to [-1, 1]."""
        z = latents * self.deviation + self.mean
        return cast(Tensor, self.autoencoder.decode(z, return_dict=False)[0]).clamp(-1, 1)

    def _unclipped(self, latents: Latents) -> Tensor:
        """Decode as `decode` does. Wan's frames are taken off the decoder: diffusers clips them after it."""
        if not isinstance(self.autoencoder, AutoencoderKLWan):
            z = latents * self.deviation + self.mean
            return cast(Tensor, self.autoencoder.decode(z, return_dict=False)[0])
        chunks = list[Tensor]()

        def keep(_net: nn.Module, _given: object, made: Tensor) -> None:
            chunks.append(made)

        hook = self.autoencoder.decoder.register_forward_hook(keep)
        try:
            self.decode(latents)
        finally:  # also when a checkpoint stops its second pass early
            hook.remove()
        side = self.autoencoder.config["patch_size"] or 1
        return rearrange(torch.cat(chunks, dim=2), "b (c q p) f h w -> b c f (h p) (w q)", p=side, q=side)

    def num_frames(self, latent_frames: int) -> int:
        """Four frames for each latent frame after the first.

        CogVideoX's decoder takes two latent frames at a time and gives four for each of an even number.
        """
        if isinstance(self.autoencoder, AutoencoderKLCogVideoX) and latent_frames % 2 == 0:
            return 4 * latent_frames
        return 4 * (latent_frames - 1) + 1

    def decode_frames(
        self, latents: Latents, picked: Int[Tensor, "b k"], *, checkpoint: bool = False
    ) -> Tensor:
        """Decode the whole clip, as frames lean on earlier ones, and pick k frames of each by number.

        Gives (b, 3, k, h, w), with gradient and not clipped. Raises ValueError if the autoencoder slices or
        tiles.
        """
        if self.autoencoder.use_slicing or self.autoencoder.use_tiling:
            raise ValueError("an autoencoder that slices or tiles has no unclipped frames: disable both")
        frames = _through(self._unclipped, latents, checkpoint).transpose(1, 2)
        which = torch.arange(len(latents), device=latents.device)[:, None]
        return frames[which, picked].transpose(1, 2)


def _through(decode: Callable[[Tensor], Tensor], z: Tensor, checkpoint: bool) -> Tensor:
    """Decode, keeping activations or not."""
    if not checkpoint:
        return decode(z)
    return cast(Tensor, recomputed(decode, z, use_reentrant=False))


def build_tiny_codec(seed: int, width: int = 32) -> FrameCodec:
    """Build the small world's codec, untrained: four latent channels, 0.2 M parameters at width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = (width,) * 4  # AutoencoderTiny wants equal widths
        autoencoder = AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=(0, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 0),
        )
    return FrameCodec(autoencoder, [0.0] * 4, [1.0] * 4).eval()


def _scaling(path: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel's latents, which diffusers' own folder does not hold."""
    try:
        scaling = json.loads(path.read_bytes())
        return scaling["mean"], scaling["deviation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = 'an object with "mean" and "deviation" of each channel of its latents'
        raise MissingArtifact(f"no {path.name} at {path.parent}: expected {expected}, {error!r}") from error


@contextmanager
def _without_a_false_alarm() -> Generator[None, None, None]:
    """Keep diffusers from complaining of `block_out_channels`, which its own AutoencoderTiny saved."""
    logger = logging.getLogger("diffusers.configuration_utils")
    own = lambda record: "block_out_channels" not in record.getMessage()  # noqa: E731
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)


def load_codec(path: str | Path, *, weights: bool = True) -> FrameCodec | ClipCodec:
    """Load a codec, safetensors only, frozen: an autoencoder's folder, a pipeline's, or a hub name.

    Without `weights` it is made of its config, for counting. Raises MissingArtifact when it is no codec,
    InvalidValue when its latents have no mean and deviation.
    """
    folder = part_folder(path, "vae", weights=weights)
    kind, config = read_codec(folder)
    network = getattr(diffusers, kind)
    try:
        with _without_a_false_alarm():
            how = network.load_config(folder) if not weights else None
            autoencoder = (
                network.from_config(how) if how else network.from_pretrained(folder, use_safetensors=True)
            )
    except OSError as without:
        raise MissingArtifact(
            f"{folder} has no safetensors weights: convert them, pickled ones are never read ({without})"
        ) from without
    if KINDS[kind].temporal > 1:
        made = ClipCodec(autoencoder)
    elif kind == "AutoencoderTiny":
        made = FrameCodec(autoencoder, *_scaling(folder / SCALING))
    else:
        made = FrameCodec(autoencoder, *statistics(kind, config))
    return made.eval().requires_grad_(False)
