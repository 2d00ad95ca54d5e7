"""`CogVideoXTransformer3DModel` as a field: v on a variance-preserving path, frames before channels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from raydistill.errors import InvalidValue
from raydistill.models.hunyuan import unpatchify
from raydistill.models.taps import tapped
from raydistill.models.unet import timestep_of
from raydistill.types import Latents, Text, Times


class CogVideoXField(nn.Module):
    """A CogVideoX transformer's own prediction, v, as a function of (x_t, t, text)."""

    attention: ClassVar = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that the detail expert adapts."""
    timed: ClassVar = ("time_embedding", "norm_out", "proj_out")
    """Layers that see the time, or follow it: the detail expert's own. DCM's paper has results on CogVideoX,
    its code has not; these are what its code copies of HunyuanVideo."""
    adapted: ClassVar = (*attention, "ff.net.0.proj", "ff.net.2")
    """Layers that a LoRA over the whole path adapts."""

    def __init__(self, transformer: CogVideoXTransformer3DModel):
        """Wrap, without copying. Raises InvalidValue for CogVideoX 1.5, and for one that wants an image."""
        super().__init__()
        for name in ("patch_size_t", "ofs_embed_dim"):
            if (value := transformer.config[name]) is not None:
                raise InvalidValue(name, value, "none: CogVideoX 1.0's text-to-video networks are known")
        self.transformer = transformer

    @property
    def network(self) -> CogVideoXTransformer3DModel:
        """The diffusers model."""
        return self.transformer

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    @staticmethod
    def sizes(config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int, int]]:
        """Latent channels, width of the text, and patch (frames, height, width) of a network's config."""
        side = config["patch_size"]
        return config["in_channels"], config["text_embed_dim"], (1, side, side)

    def token_grid(self, latents: Latents) -> tuple[int, int, int]:
        """Tokens of one sample of latents: frames, height, width."""
        f, h, w = latents.shape[2:]
        side = self.transformer.config["patch_size"]
        return f, h // side, w // side

    @property
    def num_blocks(self) -> int:
        """How many transformer blocks a critic may look at."""
        return len(self.transformer.transformer_blocks)

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.transformer.proj_out.in_features

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Predict v in x_t's dtype; t in [0, 1] becomes timestep 1000 t - 1, see `VariancePreserving`."""
        net = self.transformer
        dtype = net.proj_out.weight.dtype
        v = net(
            x_t.transpose(1, 2).to(dtype),
            text.to(dtype),
            timestep_of(t, x_t.device),
            image_rotary_emb=self._rotary(x_t),
            return_dict=False,
        )[0]
        return v.transpose(1, 2).to(x_t.dtype)

    def features(
        self, x_t: Latents, t: Times, text: Text, blocks: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden maps (b, tokens, dim) of the video after `blocks`, and their projections to latents.

        The projection is the network's own last norms and linear layer; for the last block it equals v.
        """
        net = self.transformer
        layers = {i: net.transformer_blocks[i] for i in blocks}
        with tapped({**layers, "time": net.time_embedding}) as given:
            self(x_t, t, text)
        temb, hidden = given["time"], [cast(Tensor, given[i][0]) for i in blocks]
        outs = [net.proj_out(net.norm_out(net.norm_final(h), temb=temb)) for h in hidden]
        side = net.config["patch_size"]
        return hidden, [unpatchify(out, x_t, (1, side, side)) for out in outs]

    def _rotary(self, x_t: Latents) -> tuple[Tensor, Tensor] | None:
        """Rotary positions as the pipeline makes them; None where positions are added (CogVideoX-2B)."""
        config = self.transformer.config
        if not config["use_rotary_positional_embeddings"]:
            return None
        frames, height, width = self.token_grid(x_t)
        side = config["patch_size"]
        whole = (config["sample_width"] // side, config["sample_height"] // side)
        made = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=get_resize_crop_region_for_grid((height, width), *whole),
            grid_size=(height, width),
            temporal_size=frames,
            device=cast(torch.device, x_t.device),
        )
        return cast(tuple[Tensor, Tensor], made)
