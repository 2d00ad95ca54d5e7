"""The lines with which anybody samples from an exported folder: diffusers alone."""

from typing import Any

import torch

from raydistill.models.lora import FILE as LORA
from raydistill.models.prompts import LENGTHS
from raydistill.pipelines.schedulers import TAKES_TIMES, Steps
from raydistill.student import Card

SECOND = {
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
    "CogVideoXPipeline": "CogVideoXTransformer3DModel",
    "TextToVideoSDPipeline": "UNet3DConditionModel",
    "AnimateDiffPipeline": "UNetMotionModel",
}
"""Networks of pipelines that hold one; the second is handed over between two steps."""
PROMPT = "a cat walks through wet grass"
LOAD = """\
import torch
from diffusers import {imported}
from diffusers.utils import export_to_video

folder = "."  # where this file is, or its name on the hub
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
"""
SWITCH = """
first = pipe.{part}
second = {network}.from_pretrained(folder, subfolder="{part}_2", dtype=dtype).to(device)


def switch({given}):  # the second expert takes over after step {last}
    pipe.{part} = second if {last} <= step + 1 < {total} else first
{back}

"""
CALLED = {
    "callback_on_step_end": {"given": "pipe, step, timestep, given", "back": "    return given\n"},
    "callback": {"given": "step, timestep, latents", "back": ""},
}
"""Arguments of a pipeline's call that hold what it runs after each step, and how that is written."""
TIMES = """\
times = {times}
pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, shift=1.0, shift_terminal=None)
"""
TAKEN = "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=times)\n"
"""Wan's call has no argument for times."""
TIMESTEPS = """\
timesteps = {timesteps}
set_timesteps = pipe.scheduler.set_timesteps
pipe.scheduler.set_timesteps = lambda _, device: set_timesteps(timesteps=timesteps, device=device)
"""
"""Nor have those of the U-Nets; their schedulers take times in place of a number of steps."""


def usage_of(kind: str, card: Card, steps: Steps, fps: int, *, lora: bool) -> str:
    """Write the program: it runs in the folder as it stands, on a GPU or a CPU, and writes video.mp4."""
    switches, count = kind in SECOND and card.boundary is not None, len(steps.plan.jumps)
    called = "callback" if kind == "TextToVideoSDPipeline" else "callback_on_step_end"
    imported = ", ".join(sorted(["DiffusionPipeline", *([SECOND[kind]] if switches else [])]))
    lines = LOAD.format(imported=imported)
    if lora:
        lines += f'pipe.load_lora_weights(folder, weight_name="{LORA}")\n'
    if not card.schedule:
        lines += TIMES.format(times=list(steps.times))
        if kind not in TAKES_TIMES:
            lines = "from functools import partial\n\n" + lines + TAKEN
    if steps.timesteps:
        lines += TIMESTEPS.format(timesteps=list(steps.timesteps))
    if switches:
        part = "unet" if "UNet" in SECOND[kind] else "transformer"
        last = sum(one.expert == "semantic" for one in steps.plan.jumps)
        lines += SWITCH.format(part=part, network=SECOND[kind], last=last, total=count, **CALLED[called])
    number = "len(timesteps)" if steps.timesteps else count
    lines += f'torch.manual_seed(0)\nframes = pipe(\n    "{PROMPT}",\n    num_inference_steps={number},\n'
    for name, value in arguments_of(kind, card, steps).items():
        lines += f"    {name}={value},\n"
    lines += f"    {called}=switch,\n" if switches else ""
    return f'{lines}    output_type="np",\n).frames[0]\nexport_to_video(frames, "video.mp4", fps={fps})\n'


def arguments_of(kind: str, card: Card, steps: Steps) -> dict[str, Any]:
    """What the pipeline's call is given, in print: times, guidance, sizes, length of captions."""
    _, f, h, w = card.latent_shape
    given: dict[str, Any] = {
        name: "times" if name == "sigmas" else value for name, value in steps.arguments.items()
    }
    given["guidance_scale"] = _guidance(kind, card)
    given |= {"height": 8 * h, "width": 8 * w, "num_frames": _frames(kind, f)}
    length = card.text.get("length", 0)
    if length and length != LENGTHS[kind]:
        given["max_sequence_length"] = length
    return given


def _frames(kind: str, latent_frames: int) -> int:
    """Frames to ask for. CogVideoX's decoder gives three more of an even number of latents."""
    temporal = 1 if kind not in LENGTHS else 4
    return temporal * (latent_frames - 1) + 1


def _guidance(kind: str, card: Card) -> float:
    """Scale to ask for: none is needed, but where it is an input of the network.

    HunyuanVideo's was trained with bfloat16's token, see `HunyuanField.forward`; so its thousandth is given.
    """
    if kind != "HunyuanVideoPipeline":
        return 1.0
    token = 1000 * torch.tensor(card.guidance_scale, dtype=torch.bfloat16)
    return float(token) / 1000
