"""What `jobs/distill.py --plan` reckons with."""

from dataclasses import dataclass

from raydistill.config.checks import at_least, positive
from raydistill.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The machine that a run is planned for, and the clips, where none are prepared yet."""

    memory_gib: float = 80.0
    """Memory of a worker's device, in GiB."""
    reserve: float = 0.08
    """Share of it that is left to the context, the allocator's gaps and communication, in [0, 1)."""
    tflops: float = 200.0
    """What a device really computes, in 10^12 operations per second: half of its peak or less."""
    price_per_hour: float = 2.5
    """Of one device, in whatever money."""
    latents: tuple[int, ...] = ()
    """Channels, frames, height, width of a clip's latents, where data= is not prepared yet:
    Wan2.1's 81 frames of 832x480 are [16,21,60,104]."""
    text: tuple[int, ...] = ()
    """Tokens and width of a caption, where data= is not prepared yet: Wan's are [512,4096]."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("memory_gib", "tflops"):
            positive(f"plan.{name}", getattr(self, name))
        at_least("plan.price_per_hour", self.price_per_hour, 0)
        if not 0.0 <= self.reserve < 1.0:
            raise InvalidValue("plan.reserve", self.reserve, "in [0, 1)")
        for name, count in (("latents", 4), ("text", 2)):
            value = getattr(self, name)
            if value and (len(value) != count or min(value) < 1):
                raise InvalidValue(f"plan.{name}", list(value), f"{count} numbers of at least 1")
        if bool(self.latents) != bool(self.text):
            raise InvalidValue("plan.text", list(self.text), "given together with plan.latents")
