"""The engine in plain torch: what DeepSpeed has to agree with, and all that one worker needs."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydistill.config.stages import OptimizerConfig
from raydistill.experts.parts import KINDS, Parts, save_parts
from raydistill.models.casting import cast_parameters


def learning_rate_at(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then constant or falling.

    With decay = linear it falls over the last half of `num_steps`; 0 would come one step after the end.
    """
    rate = config.learning_rate
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if config.decay == "linear":
        rate *= min(1.0, max(0.0, (num_steps - step) / max(1, num_steps - num_steps // 2)))
    return rate


def rank_and_size() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def build_adamw(parameters: Iterable[Tensor], config: OptimizerConfig, *, foreach: bool) -> torch.optim.AdamW:
    """Return torch's AdamW; its learning rate is set before every step.

    Numbers are the same either way. A step's temporaries are twice the largest parameter, or once all of them
    with `foreach`.
    """
    return torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        foreach=foreach,
    )


def adamw_state(optimizer: torch.optim.AdamW, parameter: Tensor, step: int = 0) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter, made as AdamW's first step makes it, with its counter set."""
    state = optimizer.state[parameter]
    if not state:
        state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in KINDS[1:]}
    if step or "step" not in state:
        state["step"] = torch.tensor(float(step), dtype=torch.float32)
    return state


class TorchEngine:
    """AdamW with accumulation, clipping and gradients averaged over the ranks. See `engine.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        num_steps: int,
        accumulation: int,
        precision: str = "fp32",
    ):
        self.module = module if precision == "fp32" else cast_parameters(module, torch.bfloat16)
        self.trainable_parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {n: p.shape for n, p in self.trainable_parameters.items()}
        self.dtype = next(iter(self.trainable_parameters.values())).dtype
        self.steps = 0
        self.grad_norm: float | None = None
        self._config, self._num_steps, self._accumulation = config, num_steps, accumulation
        self._round = 0
        # Below float32 the optimizer works on float32 copies, as DeepSpeed's does.
        self._masters = {
            n: p if p.dtype == torch.float32 else p.detach().float()
            for n, p in self.trainable_parameters.items()
        }
        self._optimizer = build_adamw(self._masters.values(), config, foreach=False)

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return learning_rate_at(self.steps, self._config, self._num_steps)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided by the number of micro-batches."""
        (loss / self._accumulation).backward()

    def step(self) -> bool:
        """Close a micro-batch; at the end of the round, update and return True."""
        self._round += 1
        if self._round % self._accumulation:
            return False
        gradients = self._average_gradients()
        norm = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients]))
        self.grad_norm = found = norm.item()
        limit = self._config.gradient_clipping
        self._update(gradients, min(1.0, limit / (found + 1e-6)) if limit else 1.0)
        self.steps += 1
        return True

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trainable parameters in float32: every rank holds everything."""
        yield from ((n, m.detach()) for n, m in self._masters.items())

    @property
    def divided(self) -> bool:
        """Never."""
        return False

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the masters: every rank holds everything."""
        return self.masters()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return the whole, as that is every rank's share."""
        return whole

    def join(self, name: str, share: Tensor) -> Tensor:
        """Return the share, as that is the whole."""
        return share

    def weights(self) -> dict[str, Tensor]:
        """Return float32 copies of the trainable parameters on the CPU."""
        return {n: m.to("cpu", copy=True) for n, m in self.masters()}

    def save(self, folder: Path) -> None:
        """Write weights and optimizer states, each rank its share."""
        rank, world_size = rank_and_size()
        save_parts(folder, self._tensors(), step=self.steps, rank=rank, world_size=world_size)

    def load(self, folder: Path) -> None:
        """Read them back. Raises IncompatibleCheckpoint."""
        parts = Parts(folder)
        parts.require(self.shapes)
        for name, master in self._masters.items():
            master.data.copy_(parts.get("weight", name))
            if parts.step:
                state = adamw_state(self._optimizer, master, parts.step)
                for key in KINDS[1:]:
                    state[key].copy_(parts.get(key, name))
        self._publish()
        self.steps, self._round = parts.step, 0

    def close(self) -> None:
        """Nothing is held outside this object."""

    def _average_gradients(self) -> list[Tensor]:
        """Take the gradients off the parameters; zeros where there is none, as in ZeRO.

        Of several ranks they are the means, in float32; otherwise as they are.
        """
        _, world_size = rank_and_size()
        gradients = list[Tensor]()
        for parameter in self.trainable_parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if world_size > 1:
                gradient = gradient.float().contiguous()
                dist.all_reduce(gradient)
                gradient.div_(world_size)
            gradients.append(gradient)
        return gradients

    def _update(self, gradients: list[Tensor], scale: float) -> None:
        """Step parameter by parameter: neither float32 copies nor AdamW's temporaries are there at once."""
        (group,) = self._optimizer.param_groups
        group["lr"] = self.learning_rate
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = gradient.float().mul_(scale)
            group["params"] = [master]
            self._optimizer.step()
            master.grad = None
        group["params"] = list(self._masters.values())
        self._publish()

    def _publish(self) -> None:
        """Copy the masters into the module's low-precision parameters."""
        for name, parameter in self.trainable_parameters.items():
            if self._masters[name] is not parameter:
                parameter.data.copy_(self._masters[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what `save` writes."""
        for name, master in self._masters.items():
            yield f"weight/{name}", master
            if self.steps:
                for key in KINDS[1:]:
                    yield f"{key}/{name}", self._optimizer.state[master][key]
