"""How gradients move between machines: one engine per trainable role, over DeepSpeed's ZeRO.

How to use one, also when the loss passes through other networks that have engines of their own:

    y = engine.module(x)                              # forward through .module, never through the wrapper
    leaf = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(leaf), leaf)   # here the graph may pass critic and teacher
    engine.backward((y * g).sum())                    # and here it ends at this engine's weights
    engine.step()

A plain `engine.backward(loss)` is right only where the loss meets no other engine's weights: DeepSpeed's
hooks sit on every weight that a backward pass reaches (the critic's gradients would be reduced in the
student's turn).
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydistill.config.engine import EngineConfig
from raydistill.config.stages import OptimizerConfig
from raydistill.errors import DistillError
from raydistill.experts.engine_json import deepspeed_config
from raydistill.experts.parts import KINDS, Parts, save_parts
from raydistill.experts.plain_engine import (
    TorchEngine,
    adamw_state,
    build_adamw,
    learning_rate_at,
    rank_and_size,
)
from raydistill.experts.protocols import Engine


def build_engine(
    module: nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    num_steps: int,
    accumulation: int = 1,
) -> Engine:
    """Take a module with its final requires_grad flags into an engine.

    `num_steps` is the length of the learning-rate curve. The engine works where the module is. With ZeRO 3
    the module's parameters become shards, and in bf16 they are cast: copy averages and targets before.
    Raises DistillError if DeepSpeed of this process is set up for another kind of device.
    """
    if config.backend == "torch":
        lengths = {"num_steps": num_steps, "accumulation": accumulation}
        return TorchEngine(module, optimizer, precision=config.precision, **lengths)
    return DeepSpeedEngine(module, config, optimizer, num_steps=num_steps, accumulation=accumulation)


class DeepSpeedEngine:
    """An `Engine` over DeepSpeed's ZeRO 0-3 with torch's AdamW."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        num_steps: int,
        accumulation: int,
    ):
        self.module = module
        self.trainable_parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        device = next(iter(self.trainable_parameters.values())).device
        self._deepspeed = load_deepspeed(device)
        join_process_group(device)
        self.shapes = {n: whole_shape(p) for n, p in self.trainable_parameters.items()}
        self.steps = 0
        self.grad_norm: float | None = None
        self._optimizer_config, self._num_steps = optimizer, num_steps
        self._stage = config.zero_stage
        # At ZeRO 1 to 3 it works on a few flat tensors: torch's way for one takes twice the memory.
        flat = config.zero_stage > 0
        self._adamw = build_adamw(self.trainable_parameters.values(), optimizer, foreach=flat)
        num_weights = sum(shape.numel() for shape in self.shapes.values())
        sizes = {"accumulation": accumulation, "num_weights": num_weights}
        json = deepspeed_config(config, optimizer, device=device, **sizes)
        with redirect_stdout(StringIO()):  # some stages print their memory whatever the log level
            self._engine, *_ = self._deepspeed.initialize(
                model=module,
                model_parameters=list(self.trainable_parameters.values()),
                optimizer=self._adamw,
                config=json,
                dist_init_required=False,
            )
        self.dtype = next(iter(self.trainable_parameters.values())).dtype

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return learning_rate_at(self.steps, self._optimizer_config, self._num_steps)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; DeepSpeed divides by those of a round."""
        if self._stage:
            # What DeepSpeed's own forward does, which `.module` goes around. Without it every micro-batch but
            # the last of a round is silently lost at ZeRO 3, and at ZeRO 1 in bf16 some count twice.
            self._engine.optimizer.clear_backward_seen_flag()
            self._deepspeed.runtime.utils.register_output_backward_hooks(
                loss, self._engine._backward_prologue
            )
        self._engine.backward(loss)

    def step(self) -> bool:
        """Close a micro-batch; at the end of the round, clip, update and return True."""
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = self.learning_rate
            if self._stage == 0:  # DeepSpeed clips here without saying by how much
                gradients = [p.grad for p in self.trainable_parameters.values() if p.grad is not None]
                self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()
        if last:
            self.steps += 1
            self.grad_norm = (
                self.grad_norm if self._stage == 0 else float(self._engine.get_global_grad_norm())
            )
        return last

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trainable parameters whole and in float32; only one is ever gathered."""
        whole = self._stage < 3 and self.dtype == torch.float32  # the module's own are the same numbers
        for name, parameter in self.trainable_parameters.items():
            yield name, (parameter if whole else self._read(parameter, KINDS[0])).detach()

    @property
    def divided(self) -> bool:
        """Whether a rank keeps only its part of each parameter: at ZeRO 3."""
        return self._stage == 3

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what this rank keeps of the masters: at ZeRO 3 its part of each, flat; below all of it."""
        if not self.divided:
            yield from self.masters()
            return
        local = self._deepspeed.utils.safe_get_local_fp32_param
        yield from ((name, local(parameter)) for name, parameter in self.trainable_parameters.items())

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's share of a whole tensor of a parameter's shape; the inverse of `join`."""
        return share_of(self.trainable_parameters[name], whole) if self.divided else whole

    def join(self, name: str, share: Tensor) -> Tensor:
        """Put a whole tensor of a parameter's shape together from all ranks' shares, on its device."""
        if not self.divided:
            return share
        shape, device = self.shapes[name], self.trainable_parameters[name].device
        whole = torch.empty(rank_and_size()[1] * share.numel(), dtype=share.dtype, device=device)
        dist.all_gather_into_tensor(whole, share.to(device).contiguous())
        return whole[: shape.numel()].view(shape)

    def weights(self) -> dict[str, Tensor]:
        """Return whole float32 copies of the trainable parameters, on the CPU of every rank."""
        return {n: m.to("cpu", torch.float32, copy=True) for n, m in self.masters()}

    def save(self, folder: Path) -> None:
        """Write weights and optimizer states, each rank its share."""
        rank, world_size = rank_and_size()
        save_parts(folder, self._tensors(), step=self.steps, rank=rank, world_size=world_size)

    def load(self, folder: Path) -> None:
        """Read them back, on any number of ranks and at any ZeRO stage."""
        parts = Parts(folder)
        parts.require(self.shapes)
        if parts.step:
            for flat in self._flat_masters():
                adamw_state(self._adamw, flat, parts.step)
            if self._stage in (1, 2):
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trainable_parameters.items():
            for kind in KINDS if parts.step else KINDS[:1]:
                self._write(parameter, kind, parts.get(kind, name))
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        self.steps = parts.step

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module and free its buffers."""
        self._engine.destroy()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what `save` writes."""
        for name, parameter in self.trainable_parameters.items():
            for kind in KINDS if self.steps else KINDS[:1]:
                yield f"{kind}/{name}", self._read(parameter, kind)

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Return the whole master weight, or a whole moment, of a parameter."""
        if self._stage == 0:
            return parameter if kind == KINDS[0] else self._adamw.state[parameter][kind]
        if kind == KINDS[0]:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)

    def _write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Take this rank's share of a whole tensor into the master weight or a moment."""
        utils = self._deepspeed.utils
        if self._stage == 0:
            self._read(parameter, kind).data.copy_(value)
        elif self._stage < 3:
            value = value.to(parameter.device)
            if kind == KINDS[0]:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self._write_shard(parameter, kind, value)

    def _write_shard(self, parameter: Any, kind: str, value: Tensor) -> None:
        """Cut ZeRO 3's shard here, as DeepSpeed's setter does not pad; then refresh the working weights."""
        shard = share_of(parameter, value)
        if kind != KINDS[0]:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, shard, kind)
            return
        self._deepspeed.utils.safe_set_local_fp32_param(parameter, shard)
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _flat_masters(self) -> list[Tensor]:
        """Return the flat float32 tensors that AdamW really works on."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self._stage == 0:
            return list(self.trainable_parameters.values())
        return [flat for group in self._adamw.param_groups for flat in group["params"]]


def whole_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter that ZeRO 3 may have divided."""
    return getattr(parameter, "ds_shape", parameter.shape)


def share_of(parameter: Any, whole: Tensor) -> Tensor:
    """Cut this rank's part, flat and padded, of a tensor shaped as a parameter that ZeRO 3 divides."""
    length = parameter.ds_tensor.numel()
    start = rank_and_size()[0] * length
    share = whole.flatten()[start : start + length]
    return torch.nn.functional.pad(share, (0, length - share.numel()))


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, quietly, and on CPU without its shared-memory all-reduce.

    That operator leaves 66 MiB per rank in /dev/shm even after a clean exit, and needs a compiler. A worker
    may train on the CPU of a machine that has a GPU, so DeepSpeed is told and not left to look. Raises
    DistillError if it was told otherwise before.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports touch what torch deprecates
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

    if (found := cast(Any, get_accelerator()).device_name()) != device.type:
        raise DistillError(
            f"DeepSpeed works on '{found}' in this process, but the model is on '{device.type}': "
            "unset DS_ACCELERATOR, or set scale.use_gpu to match"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its calls of collectives that torch renames are none of the user's business.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_process_group(device: torch.device) -> None:
    """Join the workers' process group, or make one of this process alone; DeepSpeed takes it over."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **alone)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # read by DeepSpeed even now
    load_deepspeed(device).init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
