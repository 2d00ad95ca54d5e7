"""Settings of jobs/pretrain.py, which trains the small world's codec, judge and teacher."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from raydistill.config.checks import at_least, clip_size
from raydistill.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One network of the small world, trained in one process on clips drawn on the fly."""

    part: str = MISSING
    """Which network: codec, judge, teacher or features; judge and teacher need a codec."""
    output: str = MISSING
    """Folder that receives <part>/ with safetensors, and <part>.state for resuming."""
    codec: str = ""
    """Folder of the codec that judge and teacher go through; output/codec if empty."""
    start: str = ""
    """Folder of the teacher whose weights are the first ones; random if empty."""
    seed: int = 0
    """Seed of weights, clips and draws."""
    num_steps: int = 1000
    """Optimiser steps."""
    batch: int = 32
    """Samples per step: clips, or frames for the codec."""
    num_clips: int = 12288
    """How many clips are drawn; none of a held-out caption."""
    size: int = 32
    """Side of the clips in pixels, a multiple of 32: the same scenes, drawn finer. The judge sees them
    averaged down to 32."""
    severities: tuple[float, ...] = (0.0,)
    """How poor the clips are, each in [0, 1], dealt out in turn; 0 is as drawn. At size 32 alone."""
    num_layers: int = 5
    """Transformer blocks of the teacher. This and the three below are unused with start."""
    num_heads: int = 4
    """Attention heads of the teacher."""
    dim_head: int = 32
    """Width of each, an even number; a token is num_heads times as wide."""
    ffn_dim: int = 512
    """Width of the teacher's feed-forward layers."""
    codec_width: int = 32
    """Channels inside the codec; its latents have 4, an eighth as high and wide as the frames."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; linear warm-up over 100 steps, linear decay to zero in the second half."""
    muon_rate: float = 4e-3
    """Peak rate of Muon on the teacher's block matrices, RMS-matched to AdamW; 0 uses AdamW alone."""
    average_decay: float = 0.999
    """Decay of the moving average of weights that is saved."""
    caption_dropout: float = 0.1
    """Share of samples trained with the null text, for guidance."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network is trained; clips are drawn on the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward; weights, averages and optimizer states are float32 either way."""
    threads: int = 2
    """CPU threads."""
    save_every: int = 1000
    """Steps between snapshots."""

    def __post_init__(self):
        """Refuse unknown parts and empty runs."""
        if self.part not in ("codec", "judge", "teacher", "features"):
            raise InvalidValue("part", self.part, "one of codec, judge, teacher, features")
        clip_size("size", self.size)
        for name in ("num_layers", "num_heads", "dim_head", "ffn_dim", "codec_width"):
            at_least(name, getattr(self, name), 1)
        if self.dim_head % 2:
            raise InvalidValue("dim_head", self.dim_head, "even: rotary positions turn pairs")
        if self.size != 32 and any(self.severities):
            raise InvalidValue(
                "severities", self.severities, f"0 at size={self.size}: poor clips have 32 pixels"
            )
        if not self.severities or not all(0 <= one <= 1 for one in self.severities):
            raise InvalidValue("severities", self.severities, "one or more numbers in [0, 1]")
        if self.num_steps < 1 or self.batch < 1 or self.num_clips < self.batch:
            raise InvalidValue(
                "num_steps, batch, num_clips", self.num_steps, "at least one step and one batch"
            )
