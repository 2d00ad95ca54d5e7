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
first = pipe.transformer
second = {network}.from_pretrained(folder, subfolder="transformer_2", dtype=dtype).to(device)


def switch(pipe, step, timestep, given):  # the second expert takes over after step {last}
    pipe.transformer = second if {count} <= step + 1 < {total} else first
    return given


"""
TIMES = """\
times = {times}
pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, shift=1.0, shift_terminal=None)
"""
TAKEN = "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=times)\n"
"""Wan's call has no argument for times."""


def usage_of(kind: str, card: Card, steps: Steps, fps: int, *, lora: bool) -> str:
    """Write the program: it runs in the folder as it stands, on a GPU or a CPU, and writes video.mp4."""
    switches, count = kind in SECOND and card.boundary is not None, len(steps.plan.jumps)
    imported = ", ".join(sorted(["DiffusionPipeline", *([SECOND[kind]] if switches else [])]))
    lines = LOAD.format(imported=imported)
    if lora:
        lines += f'pipe.load_lora_weights(folder, weight_name="{LORA}")\n'
    if not card.schedule:
        lines += TIMES.format(times=list(steps.times))
        if kind not in TAKES_TIMES:
            lines = "from functools import partial\n\n" + lines + TAKEN
    if switches:
        last = sum(one.expert == "semantic" for one in steps.plan.jumps)
        lines += SWITCH.format(network=SECOND[kind], count=last, last=last, total=count)
    lines += f'torch.manual_seed(0)\nframes = pipe(\n    "{PROMPT}",\n    num_inference_steps={count},\n'
    for name, value in arguments_of(kind, card, steps).items():
        lines += f"    {name}={value},\n"
    lines += "    callback_on_step_end=switch,\n" if switches else ""
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
