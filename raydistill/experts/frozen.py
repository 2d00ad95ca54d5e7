"""Networks in shards: every worker holds its part of each weight, by DeepSpeed's ZeRO 3.

Of a frozen one a layer's weights are gathered for its pass and freed after it, so all workers must make the
same passes, in the same order. Gradients may go through the network, to its input.
"""

import copy
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raydistill.experts.engine import join_process_group, load_deepspeed, share_of

Module = TypeVar("Module", bound=nn.Module)


class Cutter:
    """Takes parameters apart one by one, before `Shards` or an engine at ZeRO 3 takes the network.

    None is ever whole but the last.

    All ranks hand over the same ones in the same order, and all get rank 0's numbers.
    """

    def __init__(self, config: dict[str, Any], device: torch.device):
        """With DeepSpeed's JSON of whoever takes the network: `frozen_config`, or that of an engine."""
        self._deepspeed, self._config = load_deepspeed(device), config
        join_process_group(device)
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        """Leave this rank's share of a parameter in it."""
        if self._first is not None:
            self._first.convert_to_zero_parameters([parameter])
            return
        self._first, alone = parameter, nn.Module()
        alone.register_parameter("first", parameter)
        self._deepspeed.zero.Init(module=alone, dtype=parameter.dtype, config_dict_or_path=self._config)


class Shards:
    """Holds a network's shards, and DeepSpeed's hooks on it. All ranks build and use it alike."""

    def __init__(self, module: nn.Module, *, offload: bool = False):
        """Take a frozen network apart, or one that is, in the dtype and on the device of its parameters.

        With `offload` the shards are in host memory.
        """
        self.module = module
        first = next(module.parameters())
        deepspeed = load_deepspeed(first.device)
        join_process_group(first.device)
        with redirect_stdout(StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                config=frozen_config(first.dtype, first.device, offload),
                dist_init_required=False,
            )

    def release(self) -> None:
        """Free what a backward pass has left gathered: layers whose input needs no gradient."""
        self._engine.optimizer.release_backward_leftovers()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module; it is of no use afterwards."""
        self._engine.destroy()


def write(parameter: Any, value: Tensor) -> None:
    """Set a parameter, whole or divided, from a whole tensor."""
    divided = hasattr(parameter, "ds_tensor")
    (parameter.ds_tensor if divided else parameter).data.copy_(
        share_of(parameter, value) if divided else value
    )


def copy_whole(module: Module) -> Module:
    """Copy a module; of one that is divided the copy is whole. All ranks together."""
    divided = [p for p in module.parameters() if hasattr(p, "ds_tensor")]
    if not divided:
        return copy.deepcopy(module)
    with load_deepspeed(divided[0].device).zero.GatheredParameters(divided):
        return copy.deepcopy(module)


def frozen_config(dtype: torch.dtype, device: torch.device, offload: bool) -> dict[str, Any]:
    """Return DeepSpeed's JSON for a network that nothing trains."""
    away = {"offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"}} if offload else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a name only
        "zero_optimization": {
            "stage": 3,
            **away,
            # Nothing stays whole, and nothing is fetched ahead of its turn or kept for a later one: the
            # passes of a step differ (guided, through features, backward), and a gather is short beside a
            # layer's work on a clip.
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            # It would replace torch's linear layers in the whole process, and round otherwise.
            "memory_efficient_linear": False,
            "overlap_comm": False,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "wall_clock_breakdown": False,
    }
