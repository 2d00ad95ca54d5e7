"""`HunyuanVideoTransformer3DModel` as a velocity field: two captions in one tensor, guidance as an input."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from jaxtyping import Bool, Float
from torch import Tensor, nn

from raydistill.errors import InvalidValue
from raydistill.models.taps import tapped
from raydistill.types import Latents, Text, Times

GUIDANCE = 6.0
"""The pipeline's own scale."""


def pack_text(
    states: Text, pooled: Float[Tensor, "b p"], mask: Bool[Tensor, "b l"]
) -> Float[Tensor, "b m d"]:
    """Put the pooled caption, filled up with zeros, before the tokens, as DCM's data has it; m = l + 1.

    Tokens that the mask leaves out become zeros, from which `unpack_text` finds the mask again: the network
    looks at no such token, so nothing else is lost. Raises ValueError if a pooled caption is wider.
    """
    if pooled.shape[-1] > states.shape[-1]:
        raise ValueError(f"pooled captions of width {pooled.shape[-1]} beside tokens of {states.shape[-1]}")
    first = F.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
    return torch.cat([first[:, None], states * mask[..., None].to(states)], dim=1)


def unpack_text(
    text: Float[Tensor, "b m d"], width: int
) -> tuple[Text, Float[Tensor, "b p"], Bool[Tensor, "b l"]]:
    """Inverse of `pack_text`: tokens, pooled caption of this width, mask."""
    states = text[:, 1:]
    return states, text[:, 0, :width], (states != 0).any(dim=-1)


class HunyuanField(nn.Module):
    """A HunyuanVideo transformer as v(x_t, t, text); text as `pack_text` makes it."""

    attention: ClassVar = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that the detail expert adapts (DCM's code); the text stream's own projections are not among
    them, the token refiner's are."""
    timed: ClassVar = ("time_text_embed", "norm_out", "proj_out")
    """Layers that see the time, or follow it: the detail expert's own (DCM's code)."""
    adapted: ClassVar = (*attention, "ff.net.0.proj", "ff.net.2", "proj_mlp")
    """Layers that a LoRA over the whole path adapts."""

    def __init__(self, transformer: HunyuanVideoTransformer3DModel):
        """Wrap, without copying. Raises InvalidValue for a network that wants an image."""
        super().__init__()
        if kind := transformer.config["image_condition_type"]:
            raise InvalidValue("image_condition_type", kind, "none: only text-to-video teachers are known")
        self.transformer = transformer
        self.guidance = GUIDANCE
        """Scale given to the network where a call names none."""

    @property
    def network(self) -> HunyuanVideoTransformer3DModel:
        """The diffusers model."""
        return self.transformer

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input, so that no second pass is needed."""
        return bool(self.transformer.config["guidance_embeds"])

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    @staticmethod
    def sizes(config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int, int]]:
        """Latent channels, width of the text, and patch (frames, height, width) of a network's config."""
        side = config["patch_size"]
        return config["in_channels"], config["text_embed_dim"], (config["patch_size_t"], side, side)

    def token_grid(self, latents: Latents) -> tuple[int, int, int]:
        """Tokens of one sample of latents: frames, height, width."""
        f, h, w = latents.shape[2:]
        _, _, (pf, ph, pw) = self.sizes(self.transformer.config)
        return f // pf, h // ph, w // pw

    @property
    def num_blocks(self) -> int:
        """How many blocks a critic may look at: the single-stream ones (DCM's code)."""
        return len(self.transformer.single_transformer_blocks)

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.transformer.proj_out.in_features

    def forward(self, x_t: Latents, t: Times, text: Text, guidance: Times | None = None) -> Latents:
        """Predict the velocity in x_t's dtype; t in [0, 1] becomes the unrounded timestep 1000 t.

        `guidance`: a scale of each sample's own, in place of `self.guidance`. Its token, 1000 w, is rounded
        to bfloat16 whatever the weights are: the model was published and is run so, 6 is 6016, and a student
        must meet the same token in training and afterwards.
        """
        net = self.transformer
        dtype, device = net.x_embedder.proj.weight.dtype, x_t.device
        states, pooled, mask = unpack_text(text, net.config["pooled_projection_dim"])
        token = None
        if self.embeds_guidance:
            scales = torch.full((len(x_t),), self.guidance) if guidance is None else guidance
            token = (1000 * scales.to(device, torch.bfloat16)).float()
        velocity = net(
            x_t.to(dtype),
            1000 * t.to(device, torch.float32),
            states.to(dtype),
            mask,
            pooled.to(dtype),
            guidance=token,
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)

    def features(
        self, x_t: Latents, t: Times, text: Text, blocks: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden maps (b, tokens, dim) of the video after `blocks`, and their projections to latents.

        The projection is the network's own last norm and linear layer, as DCM's feature matching uses it; for
        the last block it equals the velocity.
        """
        net = self.transformer
        layers = {i: net.single_transformer_blocks[i] for i in blocks}
        with tapped({**layers, "time": net.time_text_embed}) as given:
            self(x_t, t, text)
        temb, hidden = given["time"][0], [cast(Tensor, given[i][0]) for i in blocks]
        _, _, patch = self.sizes(net.config)
        outs = [net.proj_out(net.norm_out(h, temb)) for h in hidden]
        return hidden, [unpatchify(out, x_t, patch) for out in outs]


def unpatchify(tokens: Tensor, like: Latents, patch: tuple[int, int, int]) -> Latents:
    """Tokens (b, n, c*pf*ph*pw) to latents (b, c, f, h, w), channels first in a token."""
    b, c, f, h, w = like.shape
    pf, ph, pw = patch
    x = tokens.reshape(b, f // pf, h // ph, w // pw, c, pf, ph, pw)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, c, f, h, w)
