"""The two experts of DCM: a semantic network and a detail branch over the same, frozen weights.

The detail expert is a second module tree that *shares* the semantic expert's parameters and adds, in its own
tree only, LoRA layers and its own copies of the time-dependent layers (DCM, sec. 3.3; its code for Wan).
Nothing is switched on or off, so the semantic path cannot change while the detail expert trains, and memory
holds the base once.
"""

import copy
from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from raydistill.consistency.phases import Phases
from raydistill.models.lora import Field, attach, shared_copy
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import Teacher
from raydistill.types import Latents, Text, Times

DETAIL = "detail"
"""Name of the adapter."""


def add_detail(
    semantic: Teacher,
    rank: int,
    alpha: float,
    seed: int,
    *,
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
) -> Teacher:
    """Build a detail expert over `semantic`, frozen here; at first both compute the same, bit for bit.

    LoRA on the adapter's `attention` layers and copies of its `timed` ones: only these require gradients.
    `seed` draws LoRA's A matrices; B starts at zero. The semantic expert may be a LoRA itself. `copied` makes
    the copies, of networks whose weights are not all here.
    """
    semantic.requires_grad_(False)
    detail = shared_copy(semantic)
    for name in detail.timed:
        setattr(detail.network, name, copied(getattr(semantic.network, name)))
    attach(detail.network, detail.attention, rank, alpha, seed=seed, name=DETAIL)
    for layer in detail.network.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.lora_A))  # those below go on as well
    own = set(own_state(detail))
    for name, parameter in detail.named_parameters():
        parameter.requires_grad_(name in own)
    return detail


def copy_trainable(field: Field) -> Field:
    """Copy what `field` trains, share what it does not; the copy is frozen. For targets and averages."""
    frozen = (*(p for p in field.parameters() if not p.requires_grad), *field.buffers())
    return copy.deepcopy(field, {id(x): x for x in frozen}).requires_grad_(False)


def own_state(detail: Teacher) -> dict[str, Tensor]:
    """What the detail expert adds to the semantic one: LoRA and copied layers, by parameter name."""
    inside = next(name for name, module in detail.named_children() if module is detail.network)
    copied = tuple(f"{inside}.{name}." for name in detail.timed)

    def mine(name: str) -> bool:
        return f".{DETAIL}." in name if ".lora_" in name else name.startswith(copied)

    return {name: value for name, value in detail.state_dict().items() if mine(name)}


def load_own_state(detail: Teacher, state: dict[str, Tensor]) -> None:
    """Inverse of `own_state`; raises ValueError when names differ."""
    expected = own_state(detail).keys()
    if expected != state.keys():
        raise ValueError(f"detail weights do not fit: {sorted(expected ^ state.keys())[:4]} ...")
    detail.load_state_dict(state, strict=False)


class DualExpert(nn.Module):
    """Both experts behind one velocity field: each sample goes to the expert that owns its time."""

    def __init__(self, semantic: VelocityField, detail: VelocityField, boundary: float):
        """Hand over at `boundary`, in (0, 1); a sample exactly there belongs to the detail expert."""
        super().__init__()
        self.semantic, self.detail, self.boundary = semantic, detail, boundary

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Route each sample; the batch may mix both sides in any order."""
        high = Phases.dual(self.boundary).index(t) == 0  # never by a cast time: float32's 0.6 is above 0.6
        if bool(high.all()):
            return self.semantic(x_t, t, text)
        if not bool(high.any()):
            return self.detail(x_t, t, text)
        velocity = torch.empty_like(x_t)
        velocity[high] = self.semantic(x_t[high], t[high], text[high])
        velocity[~high] = self.detail(x_t[~high], t[~high], text[~high])
        return velocity
