"""The two experts of DCM: a semantic network and a detail branch over the same, frozen weights.

The detail expert is a second module tree that *shares* the semantic expert's parameters and adds, in its own
tree only, LoRA layers and its own copies of the time-dependent layers (DCM, sec. 3.3; its code for Wan).
Nothing is switched on or off, so the semantic path cannot change while the detail expert trains, and memory
holds the base once.
"""

import copy

import torch
from torch import Tensor, nn

from raydistill.consistency.phases import Phases
from raydistill.models.lora import Field, attach, merge, shared_copy
from raydistill.models.wan import WanField
from raydistill.types import Latents, Text, Times

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
DETAIL = "detail"
"""Name of the adapter."""
TIME_LAYERS = ("condition_embedder", "norm_out", "proj_out")
"""Layers of a Wan transformer that see the time, or follow it: the detail expert's own (DCM, fig. 5)."""


def add_detail(semantic: WanField, rank: int, alpha: float, seed: int) -> WanField:
    """Build a detail expert over `semantic`, frozen here; at first both compute the same, bit for bit.

    Only LoRA and copied layers require gradients. `seed` draws LoRA's A matrices; B starts at zero.
    """
    semantic.requires_grad_(False)
    detail = shared_copy(semantic)
    for name in TIME_LAYERS:
        setattr(detail.transformer, name, copy.deepcopy(getattr(semantic.transformer, name)))
    attach(detail.transformer, LORA_TARGETS, rank, alpha, seed=seed, name=DETAIL)
    for name in TIME_LAYERS:
        getattr(detail.transformer, name).requires_grad_(True)
    return detail


def merge_lora(detail: WanField) -> WanField:
    """Fold LoRA into attention weights of the detail expert's own, see `lora.merge`."""
    return merge(detail, DETAIL)


def copy_trainable(field: Field) -> Field:
    """Copy what `field` trains, share what it does not; the copy is frozen. For targets and averages."""
    frozen = (*(p for p in field.parameters() if not p.requires_grad), *field.buffers())
    return copy.deepcopy(field, {id(x): x for x in frozen}).requires_grad_(False)


def own_state(detail: WanField) -> dict[str, Tensor]:
    """What the detail expert adds to the semantic one: LoRA and copied layers, by parameter name."""
    copied = tuple(f"transformer.{name}." for name in TIME_LAYERS)
    state = detail.state_dict()
    return {k: v for k, v in state.items() if ".lora_" in k or k.startswith(copied)}


def load_own_state(detail: WanField, state: dict[str, Tensor]) -> None:
    """Inverse of `own_state`; raises ValueError when names differ."""
    expected = own_state(detail).keys()
    if expected != state.keys():
        raise ValueError(f"detail weights do not fit: {sorted(expected ^ state.keys())[:4]} ...")
    detail.load_state_dict(state, strict=False)


class DualExpert(nn.Module):
    """Both experts behind one velocity field: each sample goes to the expert that owns its time."""

    def __init__(self, semantic: WanField, detail: WanField, boundary: float):
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
