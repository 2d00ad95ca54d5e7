"""A motion run small enough for a test: teacher, codec, feature net, batches of every lane."""

from dataclasses import replace

import torch

from raydistill.config.distill import DistillConfig, EngineConfig, MixConfig, ScaleConfig, TargetConfig
from raydistill.config.stages import AppearanceConfig, MotionConfig, ObjectiveConfig, OptimizerConfig
from raydistill.experts.loop import distill
from raydistill.experts.stages import Given, build_stage
from raydistill.models.codec import build_tiny_codec
from raydistill.models.frame_features import FrameNet
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch, Images, Origin

SHAPE, TEXT = (4, 4, 4, 4), (3, 32)
GLOBAL, STEPS = 8, 3
OBJECTIVE = ObjectiveConfig(consistency=0.5, motion=1.0, appearance=0.2, huber_c=0.1)


def write_weights(folder):
    """Codec and feature net, untrained; returns settings that name them."""
    build_tiny_codec(0, width=8).save(folder / "codec")
    torch.manual_seed(0)
    FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(folder / "features")
    return config_of(folder)


def config_of(folder, *, micro_batch=GLOBAL, num_workers=1, objective=OBJECTIVE, **engine):
    return DistillConfig(
        experts="motion",
        codec=str(folder / "codec"),
        images="images" if objective.appearance else "",
        guidance_range=(1.5, 3.0),
        mix=MixConfig(real_share=0.5),
        target=TargetConfig(kind="ema"),
        engine=EngineConfig(**{"backend": "torch", **engine}),
        scale=ScaleConfig(num_workers=num_workers),
        motion=MotionConfig(
            num_steps=STEPS,
            global_batch=GLOBAL,
            micro_batch=micro_batch,
            lora_rank=2,
            objective=objective,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            appearance=AppearanceConfig(
                features=str(folder / "features"), images_per_step=GLOBAL, channels=8, gradient_penalty=0.1
            ),
        ),
    )


def teacher(seed=0):
    """A teacher of the real class whose layers all do something."""
    net = build_tiny_teacher(seed, dim_head=12, num_heads=2, num_layers=2)
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return net


def stage_of(config, net=None):
    empty = torch.zeros(1, *SHAPE), torch.zeros(1, *TEXT)
    means = (torch.full((32,), 0.1), torch.zeros(32)) if config.images else None
    return build_stage(config, "motion", Given(net or teacher(), *empty, caption_means=means))


def batches(micro_batch=GLOBAL, rank=0, num_workers=1, *, recorded=False):
    """Endless micro-batches of one rank: half videos, half simulated (or recorded), with their images."""
    share = GLOBAL // num_workers
    step = 0
    while True:
        for at in range(0, share, micro_batch):
            first = step * GLOBAL + rank * share + at
            yield one_batch(range(first, first + micro_batch), recorded=recorded)
        step += 1


def one_batch(indices, *, recorded=False):
    rows = [_row(i) for i in indices]
    latents, text, x_r, image, image_text = (torch.stack(values) for values in zip(*rows, strict=True))
    index = torch.tensor(list(indices))
    other = Origin.RECORDED if recorded else Origin.SIMULATED
    origin = torch.where(index % 2 == 0, int(Origin.VIDEO), int(other))
    images = Images(index, image, image_text)
    return Batch(index, latents, text, origin, x_r if recorded else None, images)


def _row(i):
    rng = torch.Generator().manual_seed(i)
    shapes = (SHAPE, TEXT, SHAPE, (SHAPE[0], 1, *SHAPE[2:]), TEXT)
    return tuple(torch.randn(shape, generator=rng) for shape in shapes)


def plain(objective, **changed):
    """An objective of the consistency alone, with changes."""
    return replace(objective, **{"appearance": 0.0, "motion": 0.0, "consistency": 1.0, **changed})


def norms(stage):
    """Gradient norm of each role's last step, before clipping: AdamW hardly notices a gradient's size."""
    return {f"norm {role}": engine.grad_norm for role, engine in stage.engines().items()}


def outcome(folder, micro_batch, rank=0, num_workers=1, *, recorded=False, **engine):
    """Train on one rank's share; every role's weights and averages as arrays, the first losses, the norms."""
    config = config_of(folder, micro_batch=micro_batch, num_workers=num_workers, **engine)
    stage, figures = stage_of(config), []
    how = {"report_every": 1, "save_every": STEPS, "save": lambda step: None}
    feed = batches(micro_batch, rank, num_workers, recorded=recorded)
    distill(stage, feed, report=lambda step, values: figures.append(values), **how)
    found = {role: one.weights() for role, one in stage.engines().items()}
    found |= {
        f"slow {n}": dict(slow.whole(engine))
        for n, (engine, slow) in stage.parts()["averages"].copies.items()
    }
    last = norms(stage)
    stage.close()
    losses = {key: value for key, value in figures[0].items() if key.startswith("loss/")}
    arrays = {
        role: {n: w.detach().numpy().copy() for n, w in weights.items()} for role, weights in found.items()
    }
    return arrays, losses | last


def on_every_engine(folder):
    """What one of two ranks ends with, by ZeRO stage and accumulation."""
    import torch.distributed as dist

    results = {}
    for zero_stage, rounds in ((0, 1), (1, 4), (2, 1), (3, 4)):
        micro = GLOBAL // 2 // rounds
        engine = {"backend": "deepspeed", "zero_stage": zero_stage}
        results[zero_stage, rounds] = outcome(folder, micro, dist.get_rank(), 2, recorded=True, **engine)
    return results
