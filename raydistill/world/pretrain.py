"""Training the small world's own networks: codec, judge, teacher. One process, plain torch."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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
from raydistill.world.fitting import Loss, fit, steps_done

ATTRIBUTES = {
    "shape": sprites.SHAPES,
    "colour": tuple(sprites.COLOURS),
    "direction": tuple(sprites.DIRECTIONS),
    "background": sprites.BACKGROUNDS,
    "speed": tuple(sprites.SPEEDS),
}

FRAME_ATTRIBUTES = {name: ATTRIBUTES[name] for name in ("shape", "colour", "background")}
"""What a single frame shows."""

CHUNK = 64
"""Clips that are drawn, or go through a codec, at once."""


def draw_chunks(config: PretrainConfig) -> Iterator[Tensor]:
    """Draw the training clips, CHUNK at a time, of the severities in turn: uint8 (n, 3, f, h, w)."""
    with ThreadPoolExecutor(config.threads) as pool:
        for start in range(0, config.num_clips, CHUNK):
            numbers = range(start, min(start + CHUNK, config.num_clips))
            clips = np.stack(list(pool.map(partial(_draw_clip, config), numbers)))
            yield torch.from_numpy(rearrange(clips, "n f h w c -> n c f h w").copy())


def _scene(config: PretrainConfig, number: int) -> sprites.Scene:
    return sprites.draw_scene(config.seed * 1_000_003 + number)


def _draw_clip(config: PretrainConfig, number: int) -> np.ndarray:
    severity = config.severities[number % len(config.severities)]
    clip = sprites.render(_scene(config, number), config.size)
    return degrade(clip, severity, config.seed * 1_000_003 + number)


def attributes_of(config: PretrainConfig) -> list[sprites.Attributes]:
    """What each training clip shows."""
    return [_scene(config, number).attributes for number in range(config.num_clips)]


def draw_clips(config: PretrainConfig, see: Callable[[Tensor], Tensor] = lambda clips: clips) -> Tensor:
    """Every training clip, uint8 (n, 3, f, h, w), or what `see` makes of each chunk; held once."""
    held, first = None, 0
    for chunk in map(see, draw_chunks(config)):
        if held is None:
            held = torch.empty((config.num_clips, *chunk.shape[1:]), dtype=chunk.dtype)
        held[first : first + len(chunk)] = chunk
        first += len(chunk)
    assert held is not None
    return held


def shrink(clips: Tensor) -> Tensor:
    """Average uint8 clips (n, 3, f, h, w) down to 32x32."""
    small = sprites.shrink(rearrange(clips, "n c f h w -> n f h w c").numpy())
    return torch.from_numpy(rearrange(small, "n f h w c -> n c f h w"))


def to_float(frames: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def device_of(config: PretrainConfig) -> torch.device:
    """Where to train. Raises InvalidValue for a GPU where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidValue("device", config.device, "cpu: torch finds no GPU here")
    return torch.device(config.device)


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> None:
    """Train `config.part` and write <output>/<part>/; an interrupted run goes on from its last snapshot.

    Raises InvalidValue for a GPU where there is none.
    """
    output, device = Path(config.output), device_of(config)
    if (done := steps_done(output / f"{config.part}.state")) >= config.num_steps:
        report(f"{output / config.part} is done: {done} steps")
        return
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    prepare = {"codec": _codec, "judge": _judge, "features": _features, "teacher": _teacher}[config.part]
    net, loss, save = prepare(config, device, report)
    fit(config, net, loss, save, report)


Part = tuple[nn.Module, Loss, Callable[[nn.Module], None]]
"""A network, its loss, and how its averaged weights are written."""


def _codec(config: PretrainConfig, device: torch.device, report: Callable[[str], None]) -> Part:
    clips = draw_clips(config)
    report(f"{len(clips)} clips drawn")
    codec = build_tiny_codec(config.seed, config.codec_width).to(device)
    return codec, _codec_loss(config, codec, clips), partial(_save_codec, clips, Path(config.output))


def _judge(config: PretrainConfig, device: torch.device, report: Callable[[str], None]) -> Part:
    judge = Judge(ATTRIBUTES).to(device)
    codec, coded = load_codec(_codec_folder(config)).to(device), list[Tensor]()
    quarter = max(1, config.num_clips // 4)

    def see(chunk: Tensor) -> Tensor:
        if len(through := chunk[: max(0, quarter - CHUNK * len(coded))]):
            coded.append(shrink(_round_trip(codec, through.to(device))))
        return shrink(chunk)

    clips = draw_clips(config, see)
    report(f"{len(clips)} clips drawn")
    loss = _judge_loss(config, judge, clips, torch.cat(coded), attributes_of(config))
    return judge, loss, lambda net: cast(Judge, net).save(Path(config.output, "judge"))


def _features(config: PretrainConfig, device: torch.device, report: Callable[[str], None]) -> Part:
    net = FrameNet({name: len(FRAME_ATTRIBUTES[name]) for name in FRAME_ATTRIBUTES}).to(device)
    clips = draw_clips(config)
    report(f"{len(clips)} clips drawn")
    loss = _features_loss(config, net, clips, attributes_of(config))
    return net, loss, lambda net: cast(FrameNet, net).save(Path(config.output, "features"))


def _teacher(config: PretrainConfig, device: torch.device, report: Callable[[str], None]) -> Part:
    teacher, codec = _first_teacher(config).to(device), load_codec(_codec_folder(config)).to(device)
    latents = draw_clips(config, lambda chunk: encode(codec, chunk.to(device)).cpu())
    report(f"{len(latents)} clips drawn")
    report(f"latents: std per channel {[round(v, 3) for v in latents.std(dim=(0, 2, 3, 4)).tolist()]}")
    text = WordVectors()([a.caption() for a in attributes_of(config)])

    def save(net: nn.Module) -> None:
        folder = Path(config.output, "teacher")
        cast(WanField, net).transformer.save_pretrained(folder, safe_serialization=True)

    return teacher, _teacher_loss(config, teacher, latents, text), save


def _codec_folder(config: PretrainConfig) -> Path:
    return Path(config.codec or Path(config.output, "codec"))


def build_teacher(config: PretrainConfig) -> WanField:
    """Build the untrained teacher of the sizes asked for."""
    sizes = (config.dim_head, config.num_heads, config.num_layers, config.ffn_dim)
    return build_tiny_teacher(config.seed, *sizes)


def _first_teacher(config: PretrainConfig) -> WanField:
    if not config.start:
        return build_teacher(config)
    teacher = load_teacher(config.start)
    if not isinstance(teacher, WanField):
        raise InvalidValue("start", config.start, "the folder of a WanTransformer3DModel")
    return teacher.requires_grad_(True)


@torch.no_grad()
def encode(codec: VideoCodec, clips: Tensor) -> Tensor:
    """Normalised latents of uint8 clips."""
    return codec.encode(to_float(clips))


@torch.no_grad()
def _round_trip(codec: VideoCodec, clips: Tensor) -> Tensor:
    """Encode uint8 clips and decode them again, on the CPU."""
    return codec.decode(encode(codec, clips)).mul(127.5).add(127.5).byte().cpu()


def _draws(config: PretrainConfig, step: int) -> torch.Generator:
    """Randomness of one step, a function of (seed, step), so that a resumed run draws the same."""
    return torch.Generator().manual_seed(config.seed * 1_000_000_007 + step)


def _codec_loss(config: PretrainConfig, codec: FrameCodec, clips: Tensor) -> Loss:
    per_clip = clips.shape[2]

    def loss(step: int) -> Tensor:
        rng = _draws(config, step)
        frame = torch.randint(len(clips) * per_clip, (config.batch,), generator=rng)
        x = to_float(clips[frame // per_clip, :, frame % per_clip].contiguous().to(config.device))
        z = codec.autoencoder.encode(x, return_dict=False)[0]
        noise = torch.randn(z.shape, generator=rng).to(z.device)
        z = z + 0.1 * z.detach().std() * noise  # a decoder robust to sampling error
        y = cast(Tensor, codec.autoencoder.decode(z, return_dict=False)[0])
        edges = sum((F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3)), x.new_zeros(()))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges

    return loss


@torch.no_grad()
def _save_codec(clips: Tensor, output: Path, codec: nn.Module) -> None:
    net = cast(FrameCodec, codec).autoencoder
    device = next(net.parameters()).device
    parts = (rearrange(c, "n c f h w -> (n f) c h w").to(device) for c in clips[:512].split(32))
    z = torch.cat([net.encode(to_float(part), return_dict=False)[0] for part in parts])
    mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    FrameCodec(net, mean.tolist(), deviation.tolist()).save(output / "codec")


def _judge_loss(
    config: PretrainConfig,
    judge: Judge,
    clips: Tensor,
    decoded: Tensor,
    attributes: list[sprites.Attributes],
) -> Loss:
    """Cross-entropy of `clips`, and of their first ones that went through the codec, `decoded`."""
    labels = {n: torch.tensor([v.index(getattr(a, n)) for a in attributes]) for n, v in ATTRIBUTES.items()}

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
        x = x * gain + 0.1 * torch.randn(b, 3, 1, 1, 1, generator=rng) + noise
        return _cross_entropy(judge(x.to(config.device)), {n: labels[n][index] for n in ATTRIBUTES})

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
        return _cross_entropy(net.classify(x.to(config.device)), {n: labels[n][index] for n in labels})

    return loss


def _cross_entropy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum over attributes."""
    parts = [F.cross_entropy(logits[name], labels[name].to(logits[name].device)) for name in labels]
    return sum(parts, parts[0].new_zeros(()))


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
        x_t, told = (1 - a) * x0 + a * noise, text[index] * keep
        velocity = teacher(x_t.to(config.device), t, told.to(config.device))
        return F.mse_loss(velocity, (noise - x0).to(config.device))

    return loss
