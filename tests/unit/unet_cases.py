"""Tiny random video U-Nets of diffusers' classes, saved as their pipelines lay them out."""

import torch
from diffusers import (
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)

BETAS = {"ms": "scaled_linear", "ad": "linear"}
SHAPE, TEXT = (4, 3, 4, 4), (5, 8)
"""Latents and text of one sample."""


def unet3d():
    """ModelScopeT2V's class."""
    torch.manual_seed(0)
    return UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
    )


def unet_motion():
    """AnimateDiff's class: an image U-Net with a motion adapter."""
    torch.manual_seed(0)
    image = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return UNetMotionModel.from_unet2d(image, adapter)


def scheduler(kind, **changed):
    """The pipeline's own scheduler."""
    fields = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": BETAS[kind], "clip_sample": False}
    return DDIMScheduler(**{**fields, "set_alpha_to_one": False, "steps_offset": 1, **changed})


def save(folder, kind):
    """Write `folder/unet` and `folder/scheduler`; return the U-Net's folder."""
    net = unet3d() if kind == "ms" else unet_motion()
    net.save_pretrained(folder / "unet")
    scheduler(kind).save_pretrained(folder / "scheduler")
    return folder / "unet"


def ask(net, x, step, text):
    """One pass as the class's own pipeline makes it."""
    if isinstance(net, UNetMotionModel):
        text = text.repeat_interleave(x.shape[2], dim=0)
    with torch.no_grad():
        return net(x, step, text, return_dict=False)[0]


def inputs(batch=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *SHAPE, generator=rng), torch.randn(batch, *TEXT, generator=rng)
