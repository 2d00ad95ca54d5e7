"""`WanTransformer3DModel` as a velocity field; the only place of Wan's 0..1000 `timestep`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from raydistill.models.taps import tapped
from raydistill.types import Latents, Text, Times


class WanField(nn.Module):
    """A Wan transformer as v(x_t, t, text)."""

    attention: ClassVar = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that the detail expert adapts (DCM's code)."""
    timed: ClassVar = ("condition_embedder", "norm_out", "proj_out")
    """Layers that see the time, or follow it: the detail expert's own (DCM, fig. 5 and its code)."""
    adapted: ClassVar = (*attention, "ffn.net.0.proj", "ffn.net.2")
    """Layers that a LoRA over the whole path adapts."""

    def __init__(self, transformer: WanTransformer3DModel):
        """Wrap, without copying."""
        super().__init__()
        self.transformer = transformer

    @property
    def network(self) -> WanTransformer3DModel:
        """The diffusers model."""
        return self.transformer

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    @staticmethod
    def sizes(config: Mapping[str, Any]) -> tuple[int, int, tuple[int, int, int]]:
        """Latent channels, width of the text, and patch (frames, height, width) of a network's config."""
        return config["in_channels"], config["text_dim"], tuple(config["patch_size"])

    def token_grid(self, latents: Latents) -> tuple[int, int, int]:
        """Tokens of one sample of latents: frames, height, width."""
        f, h, w = latents.shape[2:]
        pf, ph, pw = self.transformer.config["patch_size"]
        return f // pf, h // ph, w // pw

    @property
    def num_blocks(self) -> int:
        """How many transformer blocks a critic may look at."""
        return len(self.transformer.blocks)

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.transformer.proj_out.in_features

    def forward(self, x_t: Latents, t: Times, text: Text) -> Latents:
        """Predict the velocity in x_t's dtype; t in [0, 1] becomes Wan's unrounded timestep 1000 t.

        The times may be on the CPU; latents and text are where the network is, in any dtype.
        """
        # `.dtype` of a model walks all its modules: a tenth of a small pass.
        dtype = self.transformer.patch_embedding.weight.dtype
        timestep = 1000 * t.to(x_t.device, torch.float32)
        velocity = self.transformer(x_t.to(dtype), timestep, text.to(dtype), return_dict=False)[0]
        return velocity.to(x_t.dtype)

    def features(
        self, x_t: Latents, t: Times, text: Text, blocks: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden maps (b, tokens, dim) after `blocks`, and their projections to latents (DCM sec. 3.3).

        The projection is the network's own last modulation and linear layer, as DCM's feature matching uses
        it; for the last block it equals the velocity.
        """
        net = self.transformer
        layers, tables = (
            {**{i: net.blocks[i] for i in blocks}, "time": net.condition_embedder},
            list[Tensor](),
        )

        def read(*_: object) -> None:
            tables.append(net.scale_shift_table.clone())  # in the pass: later, shards would be apart again

        with net.norm_out.register_forward_pre_hook(read), tapped(layers) as given:
            self(x_t, t, text)
        temb, hidden = given["time"][0], [cast(Tensor, given[i]) for i in blocks]
        projected: list[Tensor] = []
        shift, scale = (tables[0] + temb.unsqueeze(1)).chunk(2, dim=1)
        for h in hidden:
            out = net.proj_out((net.norm_out(h.float()) * (1 + scale) + shift).type_as(h))
            projected.append(_unpatchify(out, x_t, net.config["patch_size"]))
        return hidden, projected


def _unpatchify(tokens: Tensor, like: Latents, patch: tuple[int, int, int]) -> Latents:
    """Tokens (b, n, pf*ph*pw*c) to latents (b, c, f, h, w), in Wan's order."""
    b, c, f, h, w = like.shape
    pf, ph, pw = patch
    x = tokens.reshape(b, f // pf, h // ph, w // pw, pf, ph, pw, c)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f, h, w)


def build_tiny_teacher(
    seed: int, dim_head: int = 32, num_heads: int = 4, num_layers: int = 5, ffn_dim: int = 0
) -> WanField:
    """Build the small world's teacher, untrained: 16 tokens of (4, 16, 4, 4) latents, 1.6 M parameters.

    `ffn_dim`: width of the feed-forward layers; 0: four times a token's.

    Four frames share a token, as four frames share a latent in Wan's own codec. Rotary positions are
    relative, and with one frame per token nothing tells the network which way time runs: it learns that a
    shape moves sideways long before it learns left from right. It starts as v = x_t, close to the truth at
    high noise: an orthonormal patch embedding with its transpose as the last layer, and blocks whose gates
    are closed. That saves most of the first CPU minutes of training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = WanTransformer3DModel(
            patch_size=(4, 2, 2),
            num_attention_heads=num_heads,
            attention_head_dim=dim_head,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=64,
            ffn_dim=ffn_dim or 4 * num_heads * dim_head,
            num_layers=num_layers,
            rope_max_seq_len=64,
        )
        _start_as_identity(net)
    return WanField(net)


@torch.no_grad()
def _start_as_identity(net: WanTransformer3DModel) -> None:
    dim = net.config["num_attention_heads"] * net.config["attention_head_dim"]
    size = net.patch_embedding.weight[0].numel()  # (c, pf, ph, pw) of one token
    # Orthonormal, and scaled so that the last norm sees unit variance; a narrower network keeps what it can.
    basis = torch.linalg.qr(torch.randn(max(dim, size), min(dim, size))).Q
    basis, wide = (basis if dim >= size else basis.T), max(1.0, dim / size)
    c, *patch = net.patch_embedding.weight.shape[1:]
    net.patch_embedding.weight.copy_((basis * math.sqrt(wide)).reshape(net.patch_embedding.weight.shape))
    nn.init.zeros_(cast(Tensor, net.patch_embedding.bias))
    out = basis.reshape(dim, c, *patch).permute(2, 3, 4, 1, 0).reshape(size, dim) / math.sqrt(wide)
    net.proj_out.weight.copy_(out)  # the output's patch order is (pf, ph, pw, c)
    net.proj_out.bias.zero_()
    net.condition_embedder.time_proj.weight.zero_()
    net.condition_embedder.time_proj.bias.zero_()
    net.scale_shift_table.zero_()
    for name, weight in net.blocks.named_parameters():
        if name.endswith(("scale_shift_table", "attn2.to_out.0.weight", "attn2.to_out.0.bias")):
            weight.zero_()
