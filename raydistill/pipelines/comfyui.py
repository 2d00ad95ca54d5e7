"""A LoRA by the names of the model's own release, as ComfyUI loads it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.student import Card

PREFIX = "diffusion_model."
WAN = (
    (r"\.attn1\.to_([qkv])$", r".self_attn.\1"),
    (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"),
    (r"\.attn1\.to_out\.0$", ".self_attn.o"),
    (r"\.attn2\.to_out\.0$", ".cross_attn.o"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
)
HUNYUAN = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"double_blocks.\1.img_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"double_blocks.\1.img_mlp.fc2"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0$",
     r"txt_in.individual_token_refiner.blocks.\1.self_attn_proj"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0\.proj$",
     r"txt_in.individual_token_refiner.blocks.\1.mlp.fc1"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2$",
     r"txt_in.individual_token_refiner.blocks.\1.mlp.fc2"),
)  # fmt: skip
FUSED = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"double_blocks.\1.img_attn_qkv"),
    (r"^single_transformer_blocks\.(\d+)\.(?:attn\.to_([qkv])|proj_mlp)$", r"single_blocks.\1.linear1"),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_([qkv])$",
     r"txt_in.individual_token_refiner.blocks.\1.self_attn_qkv"),
)  # fmt: skip
"""Layers that HunyuanVideo's own release has as one: queries, keys, values and, of single blocks, the MLP."""
ORDER = ("to_q", "to_k", "to_v", "proj_mlp")

Branch = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank) of one layer."""


def has_comfyui(kind: str) -> bool:
    """Whether ComfyUI has the networks of the pipeline `kind` by itself."""
    return kind in ("WanPipeline", "HunyuanVideoPipeline")


def write_comfyui(kind: str, source: Path, target: Path, card: Card) -> None:
    """Write the LoRA in `source`, as diffusers names it, for ComfyUI."""
    assert has_comfyui(kind)
    assert card.first_lora is not None
    rank, alpha = card.first_lora
    renamed = _renamed_wan if kind == "WanPipeline" else _renamed_hunyuan
    tensors = dict[str, Tensor]()
    for name, (a, b) in renamed(branches_of(load_file(source))).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        # The scale is alpha over the layer's own rank, which is larger where layers were joined.
        tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(alpha * a.shape[0] / rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, {"format": "pt"})


def branches_of(state: Mapping[str, Tensor]) -> dict[str, Branch]:
    """Pair A and B of each layer, by its name in diffusers' network."""
    names = [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
    return {
        n.removeprefix("transformer."): (state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"])
        for n in names
    }


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, to in rules:
        new, count = re.subn(pattern, to, name)
        if count:
            return new
    return None


def _renamed_wan(branches: Mapping[str, Branch]) -> dict[str, Branch]:
    made = {_renamed(name, WAN): branch for name, branch in branches.items()}
    assert None not in made
    assert len(made) == len(branches)
    return {str(name): branch for name, branch in made.items()}


def _renamed_hunyuan(branches: Mapping[str, Branch]) -> dict[str, Branch]:
    made, joined = dict[str, Branch](), dict[str, list[tuple[int, Branch]]]()
    for name, branch in branches.items():
        if (whole := _renamed(name, FUSED)) is not None:
            place = next(k for k, end in enumerate(ORDER) if name.endswith(end))
            joined.setdefault(whole, []).append((place, branch))
        else:
            new: Any = _renamed(name, HUNYUAN)
            made[new] = branch
    assert None not in made
    return made | {name: _joined(parts) for name, parts in joined.items()}


def _joined(parts: list[tuple[int, Branch]]) -> Branch:
    """Join layers side by side: A below A, B along a diagonal; exact, of as many ranks together."""
    in_order = [branch for _, branch in sorted(parts, key=lambda one: one[0])]
    return torch.cat([a for a, _ in in_order]), torch.block_diag(*(b for _, b in in_order))
