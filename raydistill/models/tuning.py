"""How a network computes, not what: attention's kernel by name, and compiled blocks."""

from collections.abc import Iterator
from typing import Any, cast

from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import nn

from raydistill.errors import InvalidValue

NATIVE = "native"
"""Nothing is set: torch's own choice of kernel, or that of diffusers' DIFFUSERS_ATTN_BACKEND."""
FORWARD_ONLY = ("sage", "_sage", "_flash_3", "_flash_varlen_3", "aiter", "_native_npu", "_native_xla")
"""Beginnings of names of kernels that are not used where a gradient passes. SageAttention and diffusers' own
wrapper of FlashAttention 3 have no backward pass; of the others none is known. FlashAttention 3 from the hub
has one."""
FROM_HUB_WITH_GRADIENT = ("_flash_3_hub", "_flash_3_varlen_hub")
COMPILER = "inductor"
"""Backend of torch.compile."""


def attention_layers(network: nn.Module) -> Iterator[Any]:
    """What in a network takes a backend of attention: diffusers' processors that dispatch by name."""
    processors = (getattr(module, "processor", None) for module in network.modules())
    return (one for one in processors if hasattr(one, "_attention_backend"))


def require_attention(network: nn.Module, key: str, name: str, *, gradient: bool) -> None:
    """Check the name of a backend for a network, with or without weights; `gradient`: one passes through it.

    Raises InvalidValue for a name that diffusers does not know, a network whose attention is not dispatched
    by name (U-Nets, CogVideoX), and a backend without a backward pass where a gradient passes.
    """
    if name == NATIVE:
        return
    known = sorted(one.value for one in AttentionBackendName)
    if name not in known:
        raise InvalidValue(key, name, f"one of diffusers' backends: {', '.join(known)}")
    if next(attention_layers(network), None) is None:
        kind = type(network).__name__
        raise InvalidValue(key, name, f"'{NATIVE}' with a {kind}: diffusers gives its attention no choice")
    if gradient and name.startswith(FORWARD_ONLY) and name not in FROM_HUB_WITH_GRADIENT:
        raise InvalidValue(key, name, "a backend with a backward pass: a gradient goes through this network")


def set_attention(network: nn.Module, key: str, name: str) -> None:
    """Let a network use a backend of attention; no other network of the process is touched.

    diffusers also makes the last one set the default of every network without a choice of its own, which is
    undone here. Raises InvalidValue where the backend's package is missing.
    """
    if name == NATIVE:
        return
    with attention_backend(NATIVE):  # leaving it restores the default that was before
        try:
            cast(Any, network).set_attention_backend(name)
        except (RuntimeError, ValueError, ImportError, OSError) as missing:
            raise InvalidValue(key, name, f"a backend that can be used here: {missing}") from missing


def compile_blocks(network: nn.Module) -> int:
    """Compile the members of a network's own lists of blocks, each by itself; return how many.

    Blocks that are alike are compiled once (diffusers' regional compilation); names of weights stay. Hooks
    of a critic stay outside, and gradient and checkpoints pass. It happens at the first pass, and again for
    another number of samples: for one, for a second size, and from then on for any; inductor needs a C++
    compiler on CPUs.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for one in lists for block in one]
    for block in blocks:
        block.compile(backend=COMPILER)
    return len(blocks)
