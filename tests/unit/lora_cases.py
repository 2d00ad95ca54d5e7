"""Teachers of each class whose layers all do something, and a student off its start."""

import torch
import unet_cases
from motion_cases import teacher as wan_teacher

from raydistill.models.lora import add_lora, lora_state
from raydistill.models.unet import UNetField

KINDS = ["wan", "ms", "ad"]
RANK, ALPHA = 2, 4.0
T = torch.tensor([0.9, 0.3])


def field_of(kind):
    """A frozen teacher and one batch of (x_t, text).

    Frozen before anything is compared: torch may choose another product for weights that require gradients,
    and its rounding is another.
    """
    rng = torch.Generator().manual_seed(2)
    if kind == "wan":
        inputs = torch.randn(2, 4, 4, 4, 4, generator=rng), torch.randn(2, 3, 32, generator=rng)
        return wan_teacher().requires_grad_(False).eval(), inputs
    net = unet_cases.unet3d() if kind == "ms" else unet_cases.unet_motion()
    for p in net.parameters():  # nothing that is zero at first shall hide a difference
        p.data.add_(0.02 * torch.randn(p.shape, generator=rng))
    return UNetField(net).requires_grad_(False).eval(), unet_cases.inputs()


def student_of(teacher):
    """A frozen student whose branches do something."""
    student = add_lora(teacher, RANK, ALPHA, seed=0)
    rng = torch.Generator().manual_seed(3)
    for weight in lora_state(student).values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=rng))
    return student.requires_grad_(False).eval()
