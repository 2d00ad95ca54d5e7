"""What an engine holds of a network on one worker, and what a step takes for a moment: reckoned, not run.

By stages of DeepSpeed 0.19 with its own optimizers, as seen to hold; n is the number of trained weights, W of
workers, and a moment is one of these:

* the last reduction of a backward pass: the bucket, and its copy that goes over the network;
* the optimizer step: the worker's gradients once more where they are made flat (a group of 1e9 weights at a
  time at ZeRO 3), and one temporary of AdamW's in their size;
* at ZeRO 3, layers that are fetched ahead for their passes, each twice while it is put together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raydistill.config.engine import EngineConfig
from raydistill.config.stages import OptimizerConfig
from raydistill.experts.engine_json import deepspeed_config

WHOLE_REDUCTION = 500_000_000
"""Elements that DeepSpeed reduces at once where no bucket is set: at ZeRO 0, and at ZeRO 1 in bfloat16."""


Zero = Mapping[str, Any]
"""DeepSpeed's section `zero_optimization`."""
_DEFAULTS = {
    "reduce_bucket_size": WHOLE_REDUCTION,
    "sub_group_size": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Holding:
    """Bytes on a worker's device, but for `host`."""

    gradients: int
    """While activations are there: of earlier micro-batches, and the bucket."""
    optimizer: int
    """Float32 masters and AdamW's moments."""
    reduction: int
    """Gradients, and what is there with them at the last reduction of a backward pass."""
    step: int
    """Gradients, and what is there with them in the optimizer step."""
    persistent: int = 0
    """Small weights that ZeRO 3 leaves whole between steps."""
    gathered: int = 0
    """Whole weights beside the shards during passes, at most; the persistent ones are among them."""
    host: int = 0
    """In the machine's memory, at the most."""

    @property
    def update(self) -> int:
        """Gradients, and all that is there for a moment once the activations are gone."""
        return max(self.reduction + self.persistent, self.step)


@dataclass(frozen=True)
class _Sizes:
    """Of a network under an engine."""

    trained: int
    """Weights."""
    largest: int
    """Weights of the largest trained parameter."""
    share: int
    """Trained weights on one worker, where something is divided."""
    bytes: int
    """Of a weight in forward and backward."""
    workers: int


def holding(net: nn.Module, how: EngineConfig, workers: int) -> Holding:
    """Reckon for a network with its final requires_grad flags."""
    counts = [p.numel() for p in net.parameters() if p.requires_grad]
    trained = sum(counts)
    low = how.precision == "bf16"
    of = _Sizes(trained, max(counts), -(-trained // workers), 2 if low else 4, workers)
    if how.backend == "torch":
        return _plain(of)
    json = deepspeed_config(
        how, OptimizerConfig(), accumulation=1, num_weights=trained, device=torch.device("cpu")
    )
    zero = json["zero_optimization"]
    if how.zero_stage == 0:
        whole = 4 * min(trained, WHOLE_REDUCTION + of.largest)
        return Holding(4 * trained, 8 * trained, 4 * trained + whole, 4 * trained + 8 * of.largest)
    found = {1: _zero_1, 2: _zero_2, 3: _zero_3}[how.zero_stage](of, how, zero)
    return _with_gathered(found, net, of, zero) if how.zero_stage == 3 and workers > 1 else found


def _plain(of: _Sizes) -> Holding:
    """`TorchEngine`: parameters step one by one; ranks have their mean in float32."""
    low = of.bytes == 2
    gradients = of.bytes * of.trained
    means = 4 * of.trained if of.workers > 1 else gradients
    cast = 4 * of.largest if low else 0
    return Holding(
        gradients,
        (12 if low else 8) * of.trained,
        max(gradients, means + of.bytes * of.largest if low else 0),
        means + 8 * of.largest + (cast if of.workers == 1 else 0),
    )


def _zero_1(of: _Sizes, how: EngineConfig, zero: Zero) -> Holding:
    """Gradients are whole. In bfloat16 DeepSpeed has another optimizer at work, unless it is offloaded."""
    if of.bytes == 2 and not how.offload_optimizer:
        gradients = 6 * of.trained
        reduction = gradients + 2 * min(of.trained, WHOLE_REDUCTION + of.largest)
        return Holding(gradients, 12 * of.share, reduction, gradients + 4 * of.share)
    size = 4 * min(_limit(zero, "reduce_bucket_size"), -(-of.trained // 4096) * 4096)
    gradients = 4 * of.trained + size
    if not how.offload_optimizer:
        return Holding(gradients, 12 * of.share, gradients, 8 * of.share)
    host, largest = _offloaded(of), of.bytes * of.largest
    if of.bytes == 4:
        return Holding(gradients + largest, 0, gradients + largest, largest, host=host)
    left = size if of.workers > 1 else 0  # gradients of other workers' shares lie in the bucket
    reduction = gradients + 2 * of.trained + 4 * of.share + largest
    return Holding(gradients + largest, 0, reduction, 4 * of.share + left + largest, host=host)


def _zero_2(of: _Sizes, how: EngineConfig, zero: Zero) -> Holding:
    """A bucket is copied to be reduced; the worker's share stays."""
    size = _limit(zero, "reduce_bucket_size") * of.bytes
    if how.offload_optimizer:
        # In float32 gradients of earlier micro-batches are in host memory, too.
        gradients = size + of.bytes * of.largest + (4 * of.share if of.bytes == 2 else 0)
        earlier = 4 * of.share if of.bytes == 4 else 0
        host = _offloaded(of) + earlier
        return Holding(gradients, 0, gradients + size, gradients - size, host=host)
    gradients = 4 * of.share + size
    return Holding(gradients, 12 * of.share, gradients + size, 8 * of.share)


def _offloaded(of: _Sizes) -> int:
    """Masters, moments, gradients, AdamW's temporary, and buffers on the way to the device and from it."""
    return 20 * of.share + of.bytes * (of.share + of.largest)


def _zero_3(of: _Sizes, how: EngineConfig, zero: Zero) -> Holding:
    """The bucket and the worker's gradients stay between steps."""
    bucket = _limit(zero, "reduce_bucket_size")
    size = bucket * of.bytes
    received = 4 * -(-bucket // of.workers) if of.bytes == 2 else 0
    if how.offload_optimizer:  # gradients as well
        return Holding(size, 0, 2 * size + received, size, host=24 * of.share)
    gradients = 4 * of.share + size
    reduction = gradients + size + received
    group = min(of.share, _limit(zero, "sub_group_size") + of.largest)
    return Holding(gradients, 12 * of.share, reduction, gradients + 8 * group)


def _with_gathered(found: Holding, net: nn.Module, of: _Sizes, zero: Zero) -> Holding:
    """Add what is whole at a time, by the settings that `deepspeed_config` makes."""
    threshold, prefetch, live, reuse = (_limit(zero, f"stage3_{name}") for name in _LIMITS)
    counts = [p.numel() for p in net.parameters()]
    small = sum(c for c in counts if c <= threshold)
    whole = sum(counts)
    layer = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in net.modules())
    ahead = min(whole, live) + min(whole, prefetch) + layer if min(live, prefetch) else 0
    kept = min(reuse, whole) + layer if reuse else 0
    gathered = small + max(2 * layer, min(ahead, 2 * whole), kept)
    return Holding(
        found.gradients,
        found.optimizer,
        found.reduction,
        found.step,
        of.bytes * small,
        of.bytes * min(gathered, 2 * whole),
        found.host,
    )


def _limit(zero: Zero, name: str) -> int:
    """A setting's number; DeepSpeed's own where it is left out or "auto"."""
    value = zero.get(name)
    return int(value) if isinstance(value, int | float) else _DEFAULTS[name]


_LIMITS = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
