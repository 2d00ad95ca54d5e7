"""Training the small world's own networks: codec, judge, teacher. One process, plain torch."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim import _muon

from raydistill.config.pretrain import PretrainConfig
from raydistill.errors import InvalidValue
from raydistill.models.codec import FrameCodec, build_tiny_codec, load_codec
from raydistill.models.frame_features import FrameNet
from raydistill.models.judge import Judge
from raydistill.models.protocols import VideoCodec
from raydistill.models.teacher import load_teacher
from raydistill.models.text import WordVectors
from raydistill.models.wan import WanField, build_tiny_teacher
from raydistill.world import sprites
from raydistill.world.degrade import degrade

ATTRIBUTES = {
    "shape": sprites.SHAPES,
    "colour": tuple(sprites.COLOURS),
    "direction": tuple(sprites.DIRECTIONS),
    "background": sprites.BACKGROUNDS,
    "speed": tuple(sprites.SPEEDS),
}

FRAME_ATTRIBUTES = {name: ATTRIBUTES[name] for name in ("shape", "colour", "background")}
"""What a single frame shows."""

Loss = Callable[[int], Tensor]


def draw_clips(
    seed: int, count: int, severities: Sequence[float] = (0.0,)
) -> tuple[Tensor, list[sprites.Attributes]]:
    """Render `count` training clips, of the severities in turn: uint8 (n, 3, f, h, w), and attributes."""
    scenes = [sprites.draw_scene(seed * 1_000_003 + i) for i in range(count)]
    clips = np.stack(
        [
            degrade(sprites.render(scene), severities[i % len(severities)], seed * 1_000_003 + i)
            for i, scene in enumerate(scenes)
        ]
    )
    return torch.from_numpy(rearrange(clips, "n f h w c -> n c f h w").copy()), [s.attributes for s in scenes]


def to_float(frames: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> None:
    """Train `config.part` and write <output>/<part>/; an interrupted run goes on from its last snapshot."""
    output, codec_folder = Path(config.output), Path(config.codec or f"{config.output}/codec")
    state = output / f"{config.part}.state"
    if (done := _steps_done(state)) >= config.num_steps:
        report(f"{output / config.part} is done: {done} steps")
        return
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    clips, attributes = draw_clips(config.seed, config.num_clips, config.severities)
    report(f"{len(clips)} clips drawn")
    if config.part == "codec":
        codec = build_tiny_codec(config.seed)
        _fit(config, codec, _codec_loss(config, codec, clips), partial(_save_codec, clips, output), report)
    elif config.part == "judge":
        judge = Judge(ATTRIBUTES)
        loss = _judge_loss(config, judge, clips, attributes, load_codec(codec_folder))
        _fit(config, judge, loss, lambda net: cast(Judge, net).save(output / "judge"), report)
    elif config.part == "features":
        net = FrameNet({name: len(FRAME_ATTRIBUTES[name]) for name in FRAME_ATTRIBUTES})
        loss = _features_loss(config, net, clips, attributes)
        _fit(config, net, loss, lambda net: cast(FrameNet, net).save(output / "features"), report)
    else:
        teacher = _first_teacher(config)
        latents = encode_all(load_codec(codec_folder), clips)
        report(f"latents: std per channel {[round(v, 3) for v in latents.std(dim=(0, 2, 3, 4)).tolist()]}")
        text = WordVectors()([a.caption() for a in attributes])

        def save(net: nn.Module) -> None:
            cast(WanField, net).transformer.save_pretrained(output / "teacher", safe_serialization=True)

        _fit(config, teacher, _teacher_loss(config, teacher, latents, text), save, report)


def _first_teacher(config: PretrainConfig) -> WanField:
    if not config.start:
        return build_tiny_teacher(config.seed)
    teacher = load_teacher(config.start)
    if not isinstance(teacher, WanField):
        raise InvalidValue("start", config.start, "the folder of a WanTransformer3DModel")
    return teacher.requires_grad_(True)


@torch.no_grad()
def encode_all(codec: VideoCodec, clips: Tensor, batch: int = 64) -> Tensor:
    """Normalised latents of uint8 clips, batch by batch."""
    return torch.cat([codec.encode(to_float(part)) for part in clips.split(batch)])


def _draws(config: PretrainConfig, step: int) -> torch.Generator:
    """Randomness of one step, a function of (seed, step), so that a resumed run draws the same."""
    return torch.Generator().manual_seed(config.seed * 1_000_000_007 + step)


def _codec_loss(config: PretrainConfig, codec: FrameCodec, clips: Tensor) -> Loss:
    frames = rearrange(clips, "n c f h w -> (n f) c h w")

    def loss(step: int) -> Tensor:
        rng = _draws(config, step)
        x = to_float(frames[torch.randint(len(frames), (config.batch,), generator=rng)])
        z = codec.autoencoder.encode(x, return_dict=False)[0]
        z = z + 0.1 * z.detach().std() * torch.randn(
            z.shape, generator=rng
        )  # a decoder robust to sampling error
        y = cast(Tensor, codec.autoencoder.decode(z, return_dict=False)[0])
        edges = sum((F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3)), x.new_zeros(()))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges

    return loss


@torch.no_grad()
def _save_codec(clips: Tensor, output: Path, codec: nn.Module) -> None:
    net = cast(FrameCodec, codec).autoencoder
    parts = (to_float(rearrange(c, "n c f h w -> (n f) c h w")) for c in clips[:512].split(32))
    z = torch.cat([net.encode(part, return_dict=False)[0] for part in parts])
    mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    FrameCodec(net, mean.tolist(), deviation.tolist()).save(output / "codec")


def _judge_loss(
    config: PretrainConfig,
    judge: Judge,
    clips: Tensor,
    attributes: list[sprites.Attributes],
    codec: VideoCodec,
) -> Loss:
    labels = {n: torch.tensor([v.index(getattr(a, n)) for a in attributes]) for n, v in ATTRIBUTES.items()}
    decoded = torch.cat(
        [
            codec.decode(encode_all(codec, part)).mul(127.5).add(127.5).byte()
            for part in clips[: len(clips) // 4].split(64)
        ]
    )

    def loss(step: int) -> Tensor:
        rng = _draws(config, step)
        half = config.batch // 2  # half of the clips as drawn, half through the codec
        clean = torch.randint(len(clips), (half,), generator=rng)
        coded = torch.randint(len(decoded), (config.batch - half,), generator=rng)
        index = torch.cat([clean, coded])
        x = to_float(torch.cat([clips[clean], decoded[coded]]))
        b = len(x)
        gain = 1 + 0.1 * torch.randn(b, 3, 1, 1, 1, generator=rng)
        noise = 0.1 * torch.rand(b, 1, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
        logits = judge(x * gain + 0.1 * torch.randn(b, 3, 1, 1, 1, generator=rng) + noise)
        return sum((F.cross_entropy(logits[n], labels[n][index]) for n in ATTRIBUTES), x.new_zeros(()))

    return loss


def _features_loss(
    config: PretrainConfig, net: FrameNet, clips: Tensor, attributes: list[sprites.Attributes]
) -> Loss:
    """Cross-entropy of what single frames show, under changes of colour."""
    labels = {
        n: torch.tensor([v.index(getattr(a, n)) for a in attributes]) for n, v in FRAME_ATTRIBUTES.items()
    }

    def loss(step: int) -> Tensor:
        rng = _draws(config, step)
        index = torch.randint(len(clips), (config.batch,), generator=rng)
        frame = torch.randint(clips.shape[2], (config.batch,), generator=rng)
        x = to_float(clips[index, :, frame])
        gain = 1 + 0.2 * torch.randn(config.batch, 3, 1, 1, generator=rng)
        x = x * gain + 0.1 * torch.randn(config.batch, 3, 1, 1, generator=rng)
        logits = net.classify(x)
        return sum((F.cross_entropy(logits[n], labels[n][index]) for n in labels), x.new_zeros(()))

    return loss


def _teacher_loss(config: PretrainConfig, teacher: WanField, latents: Tensor, text: Tensor) -> Loss:
    def loss(step: int) -> Tensor:
        rng = _draws(config, step)
        index = torch.randint(len(latents), (config.batch,), generator=rng)
        x0, noise = latents[index], torch.randn(config.batch, *latents.shape[1:], generator=rng)
        t = (
            torch.arange(config.batch) + torch.rand(config.batch, generator=rng)
        ) / config.batch  # stratified
        keep = (torch.rand(config.batch, 1, 1, generator=rng) >= config.caption_dropout).float()
        a = t.view(-1, 1, 1, 1, 1)
        velocity = teacher((1 - a) * x0 + a * noise, t, text[index] * keep)
        return F.mse_loss(velocity, noise - x0)

    return loss


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


def _rate(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps, constant, linear to zero in the second half."""
    return min(1.0, (step + 1) / 100, 2 * (num_steps - step) / num_steps)


def _fit(
    config: PretrainConfig,
    net: nn.Module,
    loss: Loss,
    save: Callable[[nn.Module], None],
    report: Callable[[str], None],
) -> None:
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
        value = loss(step)
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"{config.part}: loss is {value.item()} at step {step}")
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        with _muon_in_float32():
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


def _steps_done(state: Path) -> int:
    return int(torch.load(state, weights_only=True, mmap=True)["step"]) if state.is_file() else 0


def _resume(
    state: Path, net: nn.Module, optimisers: list[torch.optim.Optimizer], average: dict[str, Tensor]
) -> int:
    if not state.is_file():
        return 0
    kept = torch.load(state, weights_only=True)
    net.load_state_dict(kept["net"])
    for optimiser, values in zip(optimisers, kept["optimisers"], strict=True):
        optimiser.load_state_dict(values)
    average.update(kept["average"])
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
