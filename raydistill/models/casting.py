"""Weights in half precision."""

import torch
from torch import nn


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters in place, and nothing else: Wan's rotary tables, which are buffers, would lose 2e-2."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
