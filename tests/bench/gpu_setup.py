"""What `gpu.py` measures with: random networks, settings, clocks and peaks of one size on one device."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from raydistill.config.distill import DistillConfig
from raydistill.config.load import from_command_line
from raydistill.experts.counting import LiveBytes
from raydistill.experts.loop import draw, take_turn
from raydistill.experts.meter import Meter
from raydistill.experts.planner import GIB, StagePlan, plan_stage
from raydistill.experts.semantic import Losses
from raydistill.experts.stages import Given, Stage, build_stage
from raydistill.models.wan import WanField
from raydistill.types import Batch

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs" / "wan21_1_3b" / "dcm.yaml"
Figures = dict[str, float]
Draw = Callable[[Stage, Batch], tuple[Losses, dict[str, Any]]]
Change = Callable[[Stage, WanField, Batch], None]
"""Given a stage, its teacher and the batch of all steps."""


@dataclass(frozen=True)
class Size:
    """Shapes of a network and its clips."""

    name: str
    network: dict[str, Any]
    """Of `WanTransformer3DModel`, beyond its defaults."""
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    precision: str
    matmul: int
    """Side of the square matrices that a device's rate is measured with."""
    repeats: int
    frames_kept: int
    """Latent frames of a clip whose activations a device holds without checkpoints."""
    attention: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """Changes of JOB's."""


_BLOCKS = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
REAL = Size(
    "Wan2.1-T2V-1.3B, 81 frames of 832x480",
    {**_BLOCKS, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256},
    (16, 21, 60, 104),
    (512, 4096),
    "bf16",
    8192,
    2,
    11,
    ("native", "_native_flash", "_native_cudnn", "_native_efficient"),
)
TOY = Size(
    "toy",
    {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 4, "ffn_dim": 256}
    | {"text_dim": 32, "freq_dim": 32},
    (16, 5, 16, 16),
    (16, 32),
    "fp32",
    512,
    4,
    5,
    ("native", "_native_math", "_native_flash"),
    ("detail.critic.channels=32", "detail.lora_rank=8"),
)


class Setup:
    """Networks with random weights, settings and batches of one size on one device."""

    def __init__(self, size: Size, folder: Path, device: str, *, repeats: int = 0):
        """`folder` receives the network's config, for plans; `repeats`: 0 for the size's own."""
        self.size, self.folder, self.device = size, folder, torch.device(device)
        self.repeats = repeats or size.repeats
        self.dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
        with torch.device("meta"):
            WanTransformer3DModel(**size.network).save_config(folder)
        self._plans: dict[tuple[Any, ...], StagePlan] = {}
        self._steps: dict[tuple[Any, ...], Figures] = {}

    def config(self, *changes: str) -> DistillConfig:
        """The published run's settings on one device; in plain torch, unless changed."""
        here = (f"teacher={self.folder}", f"engine.precision={self.size.precision}", "engine.backend=torch")
        one = (
            "scale.num_workers=1",
            "semantic.global_batch=1",
            "detail.global_batch=1",
            "sampling.num_steps=[4]",
        )
        argv = ["--config", str(JOB), *here, *one, *self.size.settings, *changes]
        return from_command_line(DistillConfig, argv, switches={})[0]

    def network(self, seed: int) -> WanField:
        """A network of this size in float32, on the device."""
        torch.manual_seed(seed)
        with torch.device(self.device):
            return WanField(WanTransformer3DModel(**self.size.network)).eval().requires_grad_(False)

    def latents(self, frames: int = 0) -> tuple[int, int, int, int]:
        """Of the size's clips, or of clips of so many latent frames."""
        channels, own, height, width = self.size.latents
        return channels, frames or own, height, width

    def batch(self, frames: int = 0) -> Batch:
        """One clip and its caption, of noise."""
        make = partial(torch.randn, device=self.device)
        return Batch(torch.arange(1), make(1, *self.latents(frames)), make(1, *self.size.text))

    def stage(self, name: str, config: DistillConfig, frames: int = 0) -> tuple[Stage, WanField]:
        """A stage ready to run, and its teacher."""
        shapes = torch.zeros(1, *self.latents(frames)), torch.zeros(1, *self.size.text)
        semantic = self.network(1) if name == "detail" else None
        teacher = self.network(0)
        given = Given(teacher, *(x.to(self.device) for x in shapes), semantic)
        return build_stage(config, name, given), teacher

    def plan(self, name: str, *changes: str, frames: int = 0) -> StagePlan:
        """What the planner says of the same settings."""
        key = (name, changes, frames)
        if key not in self._plans:
            shapes = self.latents(frames), self.size.text
            self._plans[key] = plan_stage(self.config(*changes), name, *shapes)
        return self._plans[key]

    @cached_property
    def matmul(self) -> float:
        """Operations per second of one product of square matrices in the networks' precision."""
        n = self.size.matmul
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        torch.mm(a, b)
        seconds = min(self.seconds(lambda: [a @ b for _ in range(10)]) / 10 for _ in range(5))
        return 2 * n**3 / seconds

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call: on a GPU to its end there, on a CPU this process's own, whatever else is running."""
        if self.device.type == "cpu":
            began = time.process_time()
            work()
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def held(self) -> int:
        """Bytes of all tensors."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.memory_allocated()
        kinds = (torch.Tensor, torch.nn.Parameter)  # by type: asking some objects for their class warns
        storages = [
            x.untyped_storage() for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu"
        ]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def repeated(self, work: Callable[[], Any], before: int) -> Figures:
        """Seconds of the first call and of the fastest after it, and the peak of memory beyond `before`.

        Other work on a machine only adds to seconds. The peak is the allocator's; on a CPU it is that of the
        tensors counted, in one call more.
        """
        first = self.seconds(work)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = min(self.seconds(work) for _ in range(self.repeats))
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            stays = self.held()
            with LiveBytes() as live:
                work()
            peak = stays + live.peak
        return {"seconds": found, "first_seconds": first, "peak_gib": (peak - before) / GIB}

    def step(
        self,
        name: str,
        *changes: str,
        drawn: Draw = draw,
        change: Change | None = None,
        planned: bool = False,
        frames: int = 0,
    ) -> Figures:
        """Measure one optimizer step of a stage; the same way again has the figures of the first time.

        Operations are the model's: what checkpoints do again is not among them. `frames`: of the clip, in
        latents; 0 for the size's own.
        """
        key = (name, changes, drawn, change, frames)
        if key not in self._steps:
            self._steps[key] = self._measured(name, changes, drawn, change, frames)
        figures = dict(self._steps[key])
        if planned:
            figures["planned_gib"] = self.plan(name, *changes, frames=frames).device / GIB
        return figures

    def _measured(
        self, name: str, changes: tuple[str, ...], drawn: Draw, change: Change | None, frames: int
    ) -> Figures:
        before, batch = self.held(), self.batch(frames)
        stage, teacher = self.stage(name, self.config(*changes), frames)
        if change is not None:
            change(stage, teacher, batch)
        figures = self.repeated(partial(take_step, stage, batch, drawn), before)
        stage.close()
        model = self.plan(name, "engine.activation_checkpointing=false", frames=frames).flops
        rate = model / figures["seconds"]
        return figures | {"model_tflop": model / 1e12, "tflops": rate / 1e12, "share": rate / self.matmul}


def take_step(stage: Stage, batch: Batch, drawn: Draw) -> None:
    """What `loop.distill` does for one micro-batch that is a whole round."""
    losses, seen = drawn(stage, batch)
    stage.engine.backward(losses.total)
    for name, companion in stage.companions.items():
        take_turn(name, companion, seen[name], Meter([0.0, 1.0]))
    del losses, seen
    assert stage.engine.step()
    stage.update_averages()
