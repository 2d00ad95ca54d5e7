"""What an engine really holds at the peaks of a step, and what is reckoned; on one rank or more."""

import gc
import time

import torch
from torch import nn

from raydistill.config.engine import EngineConfig
from raydistill.config.stages import OptimizerConfig
from raydistill.experts.counting import LiveBytes
from raydistill.experts.engine import build_engine
from raydistill.experts.holding import holding

WIDTH, BLOCKS = 48, 5
ROUND = 2
"""Micro-batches: gradients of the first are there beside the second's."""
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
NEAR = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 6000,
        "stage3_max_live_parameters": 24000,
        "stage3_max_reuse_distance": 0,
    }
}
NOTHING_AHEAD = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": WIDTH,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
}
ENGINES = {
    "torch": EngineConfig(backend="torch"),
    "torch, bf16": EngineConfig(backend="torch", precision="bf16"),
    "ZeRO 0": EngineConfig(zero_stage=0),
    "ZeRO 1": EngineConfig(zero_stage=1),
    "ZeRO 1, bf16": EngineConfig(zero_stage=1, precision="bf16"),
    "ZeRO 1, offloaded": EngineConfig(zero_stage=1, offload_optimizer=True),
    "ZeRO 1, bf16, offloaded": EngineConfig(zero_stage=1, precision="bf16", offload_optimizer=True),
    "ZeRO 2": EngineConfig(zero_stage=2),
    "ZeRO 2, bf16": EngineConfig(zero_stage=2, precision="bf16"),
    "ZeRO 2, bf16, many buckets": EngineConfig(
        zero_stage=2, precision="bf16", extra={"zero_optimization": {"reduce_bucket_size": 12_000}}
    ),
    "ZeRO 2, offloaded": EngineConfig(zero_stage=2, offload_optimizer=True),
    "ZeRO 2, bf16, offloaded": EngineConfig(zero_stage=2, precision="bf16", offload_optimizer=True),
    "ZeRO 3": EngineConfig(zero_stage=3, extra=SHARDED),
    "ZeRO 3, small weights whole": EngineConfig(zero_stage=3),
    "ZeRO 3, a little ahead": EngineConfig(zero_stage=3, extra=NEAR),
    "ZeRO 3, nothing ahead": EngineConfig(zero_stage=3, extra=NOTHING_AHEAD),
    "ZeRO 3, bf16": EngineConfig(zero_stage=3, precision="bf16", extra=SHARDED),
    "ZeRO 3, bf16, offloaded": EngineConfig(
        zero_stage=3, precision="bf16", offload_optimizer=True, extra=SHARDED
    ),
}


class Real(LiveBytes):
    """Without tensors that have no data: DeepSpeed keeps some as notes of shapes."""

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":
            self._sizes[storage] = [0]
        else:
            super()._add(storage)

    def since(self) -> int:
        """The peak since this was asked last."""
        found, self.peak = self.peak, self.live
        return found


def net() -> nn.Module:
    """A stack of layers; activations of one row are nothing beside its weights."""
    torch.manual_seed(0)
    blocks = [(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(BLOCKS)]
    return nn.Sequential(*(nn.Sequential(*block) for block in blocks))


def peaks(how: EngineConfig) -> dict[str, int]:
    """Bytes at the peaks of the second round's last micro-batch."""
    torch.set_num_threads(1)
    found = dict[str, int]()
    with Real() as live:
        engine = build_engine(net(), how, OptimizerConfig(warmup_steps=0), num_steps=9, accumulation=ROUND)
        for _ in range(2 * ROUND):
            gc.collect()
            live.since()
            loss = engine.module(torch.ones(1, WIDTH, dtype=engine.dtype)).float().square().mean()
            found["forward"] = live.since()
            engine.backward(loss)
            del loss
            found["backward"] = live.since()
            settle(live)
            live.since()
            engine.step()
            found["step"] = live.since()
    engine.close()
    return found


def settle(live: LiveBytes) -> None:
    """Wait for gloo's threads, which hold what they have reduced a moment longer."""
    last, since = live.live, time.monotonic()
    while time.monotonic() - since < 0.2:
        time.sleep(0.02)
        if live.live != last:
            last, since = live.live, time.monotonic()


def planned(how: EngineConfig, workers: int) -> dict[str, int]:
    """The same by `holding`."""
    found, whole = holding(net(), how, workers), sum(p.numel() for p in net().parameters())
    weights = (2 if how.precision == "bf16" else 4) * whole
    if how.backend == "deepspeed" and how.zero_stage == 3:
        weights //= workers
    stays = weights + found.optimizer + found.host
    # On a CPU host and device are one, and AdamW's temporary on the host is the step's alone.
    before = stays - (4 * whole // workers if how.offload_optimizer else 0)
    step = stays + found.step
    backward = before + max(found.reduction + found.persistent, found.gradients + found.gathered)
    return {"backward": backward, "step": step, "all": max(backward, step)}


def everything(names: list[str]) -> dict[str, dict[str, int]]:
    """All engines in one process."""
    return {name: peaks(ENGINES[name]) for name in names}
