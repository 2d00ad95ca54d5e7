"""The loop that trains one small network: AdamW and Muon, an averaged copy of the weights, exact resume."""

import math
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import _muon

from raydistill.config.pretrain import PretrainConfig

Loss = Callable[[int], Tensor]
"""Of a step, by its number."""


def _optimisers(config: PretrainConfig, net: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    matrices = [p for n, p in net.named_parameters() if config.muon_rate and ".blocks." in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=config.muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        optimisers.append(muon)
    return optimisers


def _orthogonalised(
    gradient: Tensor, coefficients: tuple[float, float, float], num_rounds: int, eps: float
) -> Tensor:
    """Newton-Schulz iteration towards U V^T of a matrix (Jordan et al., "Muon", 2024), in its own dtype."""
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@contextmanager
def _muon_in_float32() -> Generator[None, None, None]:
    """Let torch's Muon keep float32: on CPUs without bfloat16 units its products take many times as long."""
    theirs = _muon._zeropower_via_newtonschulz
    _muon._zeropower_via_newtonschulz = _orthogonalised
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = theirs


@contextmanager
def _bf16(device: str) -> Generator[None, None, None]:
    """Products in bfloat16, weights in float32."""
    with warnings.catch_warnings(), torch.autocast(device, torch.bfloat16):
        # RMS norms, whose weights autocast leaves alone: slower than they could be, not wrong.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def _rate(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps, constant, linear to zero in the second half."""
    return min(1.0, (step + 1) / 100, 2 * (num_steps - step) / num_steps)


def fit(
    config: PretrainConfig,
    net: nn.Module,
    loss: Loss,
    save: Callable[[nn.Module], None],
    report: Callable[[str], None],
) -> None:
    """Train `net`, which is on its device, to config.num_steps; go on where <part>.state says.

    `save` writes the averaged weights, with every snapshot. Raises FloatingPointError for a loss that is not
    finite.
    """
    report(f"{config.part}: {sum(p.numel() for p in net.parameters()):,} parameters")
    optimisers = _optimisers(config, net)
    peaks = [o.param_groups[0]["lr"] for o in optimisers]
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    state = Path(config.output) / f"{config.part}.state"
    start = _resume(state, net, optimisers, average)
    began, recent = time.monotonic(), []
    net.train()
    for step in range(start, config.num_steps):
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * _rate(step, config.num_steps)
        with _bf16(config.device) if config.precision == "bf16" else nullcontext():
            value = loss(step)
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"{config.part}: loss is {value.item()} at step {step}")
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        with _muon_in_float32() if config.device == "cpu" else nullcontext():  # GPUs have bfloat16 units
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        decay = min(config.average_decay, (step + 1) / (step + 10))
        for name, value_now in net.state_dict().items():
            average[name].lerp_(value_now, 1 - decay)
        recent.append(value.item())
        if (step + 1) % config.save_every == 0 or step + 1 == config.num_steps:
            rate = (step + 1 - start) / (time.monotonic() - began)
            left = (config.num_steps - step - 1) / rate
            report(
                f"{config.part} step {step + 1}/{config.num_steps} loss {np.mean(recent):.4f} "
                f"{rate:.1f} it/s, {left:.0f} s left"
            )
            recent = []
            _snapshot(state, step + 1, net, optimisers, average, save)


def steps_done(state: Path) -> int:
    """Return the step of a <part>.state; 0 if there is none."""
    return int(torch.load(state, weights_only=True, mmap=True)["step"]) if state.is_file() else 0


def _resume(
    state: Path, net: nn.Module, optimisers: list[torch.optim.Optimizer], average: dict[str, Tensor]
) -> int:
    if not state.is_file():
        return 0
    kept = torch.load(state, weights_only=True, map_location="cpu")
    net.load_state_dict(kept["net"])
    for optimiser, values in zip(optimisers, kept["optimisers"], strict=True):
        optimiser.load_state_dict(values)
    for name, value in kept["average"].items():
        average[name].copy_(value)
    return int(kept["step"])


def _snapshot(
    state: Path,
    step: int,
    net: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
    save: Callable[[nn.Module], None],
) -> None:
    """Save the averaged weights for use, and everything else for resuming."""
    state.parent.mkdir(parents=True, exist_ok=True)
    current = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(average)
    save(net)  # first: a last state says that all is done
    net.load_state_dict(current)
    torch.save(
        {
            "step": step,
            "net": current,
            "optimisers": [o.state_dict() for o in optimisers],
            "average": average,
        },
        state.with_suffix(".tmp"),
    )
    state.with_suffix(".tmp").rename(state)
