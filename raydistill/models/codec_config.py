"""What an autoencoder's config says of its latents, read without torch: sizes, mean and deviation."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.errors import InvalidValue, MissingArtifact


@dataclass(frozen=True)
class CodecKind:
    """How much an autoencoder's class compresses time, unless its config says otherwise."""

    temporal: int
    ratio_key: str = ""
    """Key of the config with the compression of time."""
    scaling: float = 1.0
    """What latents are multiplied by where the config of an older release does not say."""


KINDS = {
    "AutoencoderTiny": CodecKind(1),
    "AutoencoderKL": CodecKind(1, scaling=0.18215),
    "AutoencoderKLWan": CodecKind(4, "scale_factor_temporal"),
    "AutoencoderKLHunyuanVideo": CodecKind(4, "temporal_compression_ratio", 0.476986),
    "AutoencoderKLCogVideoX": CodecKind(4, "temporal_compression_ratio", 1.15258426),
}


def read_codec(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return class and config of the autoencoder in a folder. Raises MissingArtifact for any not known."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected the folder of a diffusers autoencoder"
        raise MissingArtifact(f"no codec at {folder.absolute()}: {expected}, found {error!r}") from error
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise MissingArtifact(f"{folder.absolute()} holds a {kind}: known codecs are {known}")
    return kind, config


def compression(kind: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """How many frames and pixels along a side one latent stands for."""
    known = KINDS[kind]
    temporal = int(config.get(known.ratio_key) or known.temporal)
    if kind == "AutoencoderTiny":
        return temporal, 2 ** (len(config.get("encoder_block_out_channels") or (64,) * 4) - 1)
    if kind in ("AutoencoderKL", "AutoencoderKLCogVideoX"):
        return temporal, 2 ** (len(config.get("block_out_channels") or (64,) * 4) - 1)
    key = "scale_factor_spatial" if kind == "AutoencoderKLWan" else "spatial_compression_ratio"
    return temporal, int(config.get(key) or 8)


def statistics(kind: str, config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel, as the class's own pipeline normalises them.

    Raises InvalidValue for statistics of another number of channels, or that no latents can have.
    """
    if kind == "AutoencoderKLWan":
        channels = int(config.get("z_dim") or 16)
        mean, deviation = (_numbers(config, name, channels) for name in ("latents_mean", "latents_std"))
        if min(deviation) <= 0:
            raise InvalidValue("latents_std", deviation, "above 0 in every channel")
        return mean, deviation
    scale, channels = config.get("scaling_factor", KINDS[kind].scaling), config.get("latent_channels")
    if not _is_number(scale) or scale <= 0:
        raise InvalidValue(
            "scaling_factor", scale, "a number above 0: what the pipeline multiplies latents by"
        )
    mean = [float(config.get("shift_factor") or 0.0)]
    return mean * int(channels or 1), [1 / scale] * int(channels or 1)


def _numbers(config: Mapping[str, Any], name: str, count: int) -> list[float]:
    values = config.get(name)
    if not isinstance(values, list | tuple) or len(values) != count or not all(map(_is_number, values)):
        raise InvalidValue(name, values, f"{count} numbers, one for each latent channel")
    return [float(x) for x in values]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
