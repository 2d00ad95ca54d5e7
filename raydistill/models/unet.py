"""diffusers' video U-Nets, ModelScopeT2V's and AnimateDiff's; the only place of their timestep."""

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from torch import nn

from raydistill.errors import InvalidValue
from raydistill.types import Latents, Text, Times

TIMESTEPS = 1000


class UNetField(nn.Module):
    """A U-Net's own prediction, of the noise or of v, as a function of (x_t, t, text)."""

    def __init__(self, network: UNet3DConditionModel | UNetMotionModel):
        """Wrap, without copying."""
        super().__init__()
        self.network = network

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Predict in x_t's dtype; t in [0, 1] becomes timestep 1000 t - 1, see `VariancePreserving`.

        At t = 0, clean data, the network is asked at its first timestep. The times may be on the CPU.
        """
        dtype = self.network.conv_in.weight.dtype
        timestep = (TIMESTEPS * t.to(x_t.device, torch.float64)).round().long().sub(1).clamp(min=0)
        text = text.to(dtype)
        if isinstance(
            self.network, UNetMotionModel
        ):  # AnimateDiff's pipeline repeats the text; the other not
            text = text.repeat_interleave(x_t.shape[2], dim=0)
        prediction = self.network(x_t.to(dtype), timestep, text, return_dict=False)[0]
        return prediction.to(x_t.dtype)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass. Raises InvalidValue where diffusers cannot."""
        if not self.network._supports_gradient_checkpointing:
            kind = type(self.network).__name__
            raise InvalidValue("engine.activation_checkpointing", True, f"false: diffusers' {kind} has none")
        self.network.enable_gradient_checkpointing()
