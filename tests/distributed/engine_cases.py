"""A small trainable network, its data, and training runs over any engine: what the engine tests share."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from raydistill.config.distill import EngineConfig
from raydistill.config.stages import OptimizerConfig
from raydistill.experts.engine import Engine, build_engine, load_deepspeed

NUM_STEPS, BATCH = 6, 8
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""ZeRO 3 keeps small weights whole by default, and all of these are small."""


class Net(nn.Module):
    """Odd sizes, so that shards are padded; a frozen layer, as with LoRA; a bare parameter, as in Wan."""

    def __init__(self, seed: int, width: int = 7):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.first = nn.Linear(5, width)
        self.table = nn.Parameter(torch.randn(1, width))
        self.second = nn.Linear(width, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.frozen(x)) + self.table))


def batches(steps: int, accumulation: int) -> list[torch.Tensor]:
    """Whole global micro-batches."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(BATCH, 6, generator=generator) for _ in range(steps * accumulation)]


def share(batch: torch.Tensor) -> torch.Tensor:
    """This rank's contiguous part."""
    if not dist.is_initialized():
        return batch
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def build(accumulation=1, clipping=0.05, seed=0, **settings) -> Engine:
    """An engine over a fresh `Net`."""
    settings = {"extra": SHARDED} | settings
    optimizer = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, gradient_clipping=clipping
    )
    return build_engine(
        Net(seed), EngineConfig(**settings), optimizer, num_steps=NUM_STEPS, accumulation=accumulation
    )


def train(engine: Engine, data: list[torch.Tensor]) -> list[float]:
    """Losses of the micro-batches. A pass without gradients goes before each, as for an online target."""
    losses = []
    for batch in data:
        x = share(batch).to(engine.dtype)
        with torch.no_grad():
            goal = engine.module(x).float() * 0.5 + 1.0
        loss = (engine.module(x).float() - goal).square().mean()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def weights(engine: Engine) -> dict:
    """As numpy, which travels between processes."""
    return {name: w.numpy() for name, w in engine.weights().items()}


def whole(module: nn.Module) -> AbstractContextManager:
    """Bring ZeRO 3's shards together, where there are any."""
    parameters = list(module.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    return load_deepspeed(torch.device("cpu")).zero.GatheredParameters(parameters)


def outcome(accumulation=1, clipping=0.05, **settings) -> dict:
    """A whole run: weights, losses, gradient norm, learning rate, the module's own weights."""
    engine = build(accumulation, clipping, **settings)
    losses = train(engine, batches(NUM_STEPS, accumulation))
    with whole(engine.module):
        module = {n: p.detach().float().clone().numpy() for n, p in engine.module.named_parameters()}
    assert engine.steps == NUM_STEPS
    result = {"weights": weights(engine), "module": module, "losses": losses}
    result |= {"norm": engine.grad_norm, "rate": engine.learning_rate}
    engine.close()
    return result


def resumed(folder: Path, **settings) -> dict:
    """Weights of an unbroken run, and of one that is saved half-way and taken up by a new engine."""
    data = batches(NUM_STEPS, 2)
    half = len(data) // 2
    unbroken, first, second = (build(2, **settings) for _ in range(3))
    train(unbroken, data)
    train(first, data[:half])
    first.save(folder)
    if dist.is_initialized():
        dist.barrier()
    second.load(folder)
    assert second.steps == NUM_STEPS // 2
    train(second, data[half:])
    return {"unbroken": weights(unbroken), "resumed": weights(second)}


def continued(folder: Path, **settings) -> dict:
    """Take up what `resumed` saved, with other settings or on another number of ranks."""
    engine = build(2, **settings)
    engine.load(folder)
    train(engine, batches(NUM_STEPS, 2)[NUM_STEPS:])
    return weights(engine)


def adversarial(accumulation: int, student: dict, critic: dict) -> dict:
    """Student and critic in turns; the student's loss passes the critic, whose weights must not feel it."""
    s = build(accumulation, **student)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, betas=(0.0, 0.999))
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1))
    c = build_engine(
        net, EngineConfig(extra=SHARDED, **critic), optimizer, num_steps=NUM_STEPS, accumulation=accumulation
    )
    for batch in batches(NUM_STEPS, accumulation):
        x = share(batch)
        y = s.module(x)
        leaf = y.detach().requires_grad_()
        loss = torch.relu(1 - c.module(leaf)).mean() + leaf.square().mean()
        (g,) = torch.autograd.grad(loss, leaf)
        s.backward((y * g).sum())
        logits = c.module(torch.cat([leaf.detach(), torch.ones_like(leaf)]))
        fake, real = logits.chunk(2)
        c.backward((torch.relu(1 + fake) + torch.relu(1 - real)).mean())
        assert s.step() == c.step()
    return {"student": weights(s), "critic": weights(c)}


ENGINES = {
    "torch": {"backend": "torch"},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-whole-small-weights": {"zero_stage": 3, "extra": {}},
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
}
LOW = {"zero1": {"zero_stage": 1}, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}}
PAIRS = {"zero2": ({"zero_stage": 2}, {"zero_stage": 2}), "zero3": ({"zero_stage": 3}, {"zero_stage": 3}),
         "zero1-zero0": ({"zero_stage": 1}, {"zero_stage": 0})}  # fmt: skip


def everything(folder: Path) -> dict:
    """All cases of the two-rank job: starting processes costs more than running them."""
    results: dict = {}
    for name, settings in ENGINES.items():
        for accumulation in (1, 4):
            results["run", name, accumulation] = outcome(accumulation, **settings)
        results["resume", name] = resumed(folder / name, **settings)
    for name, settings in LOW.items():
        results["bf16", name] = outcome(4, precision="bf16", **settings)
        results["resume-bf16", name] = resumed(folder / f"{name}-bf16", precision="bf16", **settings)
    for name, (student, critic) in PAIRS.items():
        results["critic", name] = adversarial(2, student, critic)
    results["continue"] = continued(folder / "zero3", zero_stage=1)
    return results
