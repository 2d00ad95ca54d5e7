"""Guidance as a teacher takes it: two passes, or an input of the network that was trained to need one."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from raydistill.consistency.solver import guided, guided_by
from raydistill.models.hunyuan import HunyuanField
from raydistill.models.pair import PairField
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import Teacher
from raydistill.types import Latents, Text, Times


def has_own_guidance(field: Teacher | PairField) -> bool:
    """Whether the network takes the scale as an input (HunyuanVideo): read from its config, never set."""
    return isinstance(field, HunyuanField) and field.embeds_guidance


def guide_teacher(
    field: Teacher | PairField, null_text: Float[Tensor, "l d"], guidance_scale: float
) -> VelocityField:
    """Guide a teacher by one scale for all, see `solver.guided`."""
    if not has_own_guidance(field):
        return guided(field, null_text, guidance_scale)
    return lambda x_t, t, text: field(x_t, t, text, t.new_full((len(t),), guidance_scale))


def guide_teacher_by(
    field: Teacher | PairField, null_text: Float[Tensor, "l d"]
) -> Callable[[Latents, Times, Text, Times], Latents]:
    """Guide a teacher by a scale of each sample's own, given with the text."""
    return field if has_own_guidance(field) else guided_by(field, null_text)
