"""What `jobs/consolidate.py` takes."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True)
class ConsolidateConfig:
    """The student that a checkpoint holds, on one machine without Ray: of a run that goes on, or stopped."""

    checkpoint: str = MISSING
    """Folder RUN/checkpoints/STAGE-step-NUMBER, of any number of workers. One of the detail expert needs the
    semantic stage's last beside it; one of the semantic expert of two gives a student whose end is the
    teacher's."""
    output: str = MISSING
    """Folder to write: a new one, or an empty one."""
    settings: str = ""
    """The run's settings; empty: config.yaml in its folder."""
    teacher: str = ""
    """Where the run's teacher lies on this machine; empty: where the run had it."""
    data: str = ""
    """Where the run's latents lie on this machine: sizes and the empty caption are read; empty: where the run
    had them."""
