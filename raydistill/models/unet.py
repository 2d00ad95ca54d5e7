"""diffusers' video U-Nets, ModelScopeT2V's and AnimateDiff's; the only place of their timestep."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

from raydistill.errors import InvalidValue
from raydistill.types import Latents, Text, Times

TIMESTEPS = 1000


def timestep_of(t: Times, device: torch.device) -> Tensor:
    """Timesteps 1000 t - 1 of times t in [0, 1]; clean data, at t = 0, has the first."""
    return (TIMESTEPS * t.to(device, torch.float64)).round().long().sub(1).clamp(min=0)


def _in_dtype_of_input(_layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """AnimateDiff's tables of positions, buffers in float32, shall not make bfloat16 states so."""
    return out.to(given[0].dtype)


class UNetField(nn.Module):
    """A U-Net's own prediction, of the noise or of v, as a function of (x_t, t, text)."""

    attention: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj")
    """Layers that the detail expert adapts: attention, and where time enters a block. DCM has no U-Net."""
    timed: ClassVar = ("time_embedding", "conv_norm_out", "conv_out")
    """Layers that see the time, or follow all that does: the detail expert's own."""
    adapted: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    """Layers that a LoRA over the whole path adapts (MCM's list)."""

    def __init__(self, network: UNet3DConditionModel | UNetMotionModel):
        """Wrap, without copying."""
        super().__init__()
        self.network = network
        for layer in network.modules():
            if isinstance(layer, SinusoidalPositionalEmbedding):
                layer.register_forward_hook(_in_dtype_of_input)

    @staticmethod
    def sizes(config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int, int]]:
        """Latent channels, width of the text, and what (frames, height, width) must divide by."""
        halvings = 2 ** (len(config["block_out_channels"]) - 1)
        return config["in_channels"], config["cross_attention_dim"], (1, halvings, halvings)

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Predict in x_t's dtype; t in [0, 1] becomes timestep 1000 t - 1, see `VariancePreserving`.

        At t = 0, clean data, the network is asked at its first timestep. The times may be on the CPU.
        """
        dtype = self.network.conv_in.weight.dtype
        timestep, text = timestep_of(t, x_t.device), text.to(dtype)
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
