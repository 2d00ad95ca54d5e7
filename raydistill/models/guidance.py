"""Guidance as a teacher takes it: two passes, or an input of the network that was trained to need one."""

from collections.abc import Callable

import torch
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
    field: Teacher | PairField,
    null_text: Float[Tensor, "l d"],
    guidance_scale: float,
    guidance_scale_2: float | None = None,
) -> VelocityField:
    """Guide a teacher by one scale for all, see `solver.guided`; of two networks each may have its own."""
    if isinstance(field, PairField) and guidance_scale_2 not in (None, guidance_scale):
        by, ratio, scales = guided_by(field, null_text), field.ratio, (guidance_scale, guidance_scale_2)
        return lambda x_t, t, text: by(x_t, t, text, torch.where(t.double() >= ratio, *scales))
    if not has_own_guidance(field):
        return guided(field, null_text, guidance_scale)
    return lambda x_t, t, text: field(x_t, t, text, t.new_full((len(t),), guidance_scale))


def guide_teacher_by(
    field: Teacher | PairField, null_text: Float[Tensor, "l d"]
) -> Callable[[Latents, Times, Text, Times], Latents]:
    """Guide a teacher by a scale of each sample's own, given with the text."""
    return field if has_own_guidance(field) else guided_by(field, null_text)
