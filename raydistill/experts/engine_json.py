"""DeepSpeed's own settings, made of ours."""

from collections.abc import Mapping
from typing import Any

import torch

from raydistill.config.engine import EngineConfig
from raydistill.config.stages import OptimizerConfig

LIVE, PREFETCH = 200_000_000, 50_000_000
"""Weights of a trained network that ZeRO 3 has whole at a time, and fetches at a time: 0.4 and 0.1 GB in
bfloat16, of a 14B model half a block and a fraction of a layer."""


def deepspeed_config(
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    accumulation: int,
    num_weights: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return DeepSpeed's own JSON; `config.extra` is merged in last, section by section.

    ZeRO 3 has whole, beside the shards, at most the layer at work and LIVE weights that are fetched ahead,
    PREFETCH at a time; DeepSpeed by itself runs up to a billion weights ahead.
    """
    bucket = min(
        -(-num_weights // 4096) * 4096, 100_000_000
    )  # DeepSpeed's 500 million are 2 GB for the smallest model
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 100_000,
            "stage3_prefetch_bucket_size": PREFETCH,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # a name only: batches are the loop's business
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(result, config.extra)


def _merged(ours: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return `ours` with the keys of `extra` set, descending into sections."""
    result = dict(ours)
    for key, value in extra.items():
        section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if section else value
    return result
