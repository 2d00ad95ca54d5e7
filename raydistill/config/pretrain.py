"""Settings of jobs/pretrain.py, which trains the small world's codec, judge and teacher."""

from dataclasses import dataclass

from omegaconf import MISSING

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
    severities: tuple[float, ...] = (0.0,)
    """How poor the clips are, each in [0, 1], dealt out in turn; 0 is as drawn."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; linear warm-up over 100 steps, linear decay to zero in the second half."""
    muon_rate: float = 4e-3
    """Peak rate of Muon on the teacher's block matrices, RMS-matched to AdamW; 0 uses AdamW alone."""
    average_decay: float = 0.999
    """Decay of the moving average of weights that is saved."""
    caption_dropout: float = 0.1
    """Share of samples trained with the null text, for guidance."""
    threads: int = 2
    """CPU threads."""
    save_every: int = 1000
    """Steps between snapshots."""

    def __post_init__(self):
        """Refuse unknown parts and empty runs."""
        if self.part not in ("codec", "judge", "teacher", "features"):
            raise InvalidValue("part", self.part, "one of codec, judge, teacher, features")
        if not self.severities or not all(0 <= one <= 1 for one in self.severities):
            raise InvalidValue("severities", self.severities, "one or more numbers in [0, 1]")
        if self.num_steps < 1 or self.batch < 1 or self.num_clips < self.batch:
            raise InvalidValue(
                "num_steps, batch, num_clips", self.num_steps, "at least one step and one batch"
            )
