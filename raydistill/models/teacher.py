"""Teachers by what their folder holds: diffusers' Wan transformer and video U-Nets; their noise schedules."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, WanTransformer3DModel

from raydistill.consistency.schedule import RECTIFIED_FLOW, Schedule, VariancePreserving
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact
from raydistill.models.unet import TIMESTEPS, UNetField
from raydistill.models.wan import WanField

Teacher = WanField | UNetField
UNETS = {"UNet3DConditionModel": UNet3DConditionModel, "UNetMotionModel": UNetMotionModel}
KINDS: dict[str, Any] = {"WanTransformer3DModel": WanTransformer3DModel, **UNETS}
SCHEDULER = "scheduler_config.json"
PREDICTIONS: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
BETAS = {"linear": VariancePreserving.linear, "scaled_linear": VariancePreserving.scaled_linear}
KNOWN = {"beta_schedule": BETAS, "prediction_type": PREDICTIONS, "num_train_timesteps": (TIMESTEPS,)}


def _kind(folder: Path) -> str:
    """Class of the network in a folder. Raises MissingArtifact for any that is not known."""
    try:
        kind = json.loads((folder / "config.json").read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = repr(error)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise MissingArtifact(
            f"no teacher at {folder}: expected the folder of a diffusers {known}; found {kind}"
        )
    return kind


def load_teacher(path: str | Path) -> Teacher:
    """Load a folder of `save_pretrained` in float32, safetensors only. Raises MissingArtifact."""
    folder = Path(path)
    kind = _kind(folder)
    network = KINDS[kind].from_pretrained(folder, use_safetensors=True)
    return (UNetField(network) if kind in UNETS else WanField(network)).eval()


def read_teacher_config(path: str | Path) -> Mapping[str, Any]:
    """Return a teacher's sizes without its weights, defaults included. Raises MissingArtifact."""
    folder = Path(path)
    network = KINDS[_kind(folder)]
    with torch.device("meta"):
        return network.from_config(cast(dict[str, Any], network.load_config(folder))).config


def require_fit(path: str | Path, latent_shape: Sequence[int], text_shape: Sequence[int]) -> None:
    """Compare one sample's latents (c, f, h, w) and text (l, d) with what a teacher takes.

    Raises StaleArtifact for other channels, another width of text, or sizes that its patches or levels do not
    divide.
    """
    net, is_unet = read_teacher_config(path), _kind(Path(path)) in UNETS
    width = net["cross_attention_dim"] if is_unet else net["text_dim"]
    if (net["in_channels"], width) != (latent_shape[0], text_shape[-1]):
        raise StaleArtifact(
            f"{path} takes {net['in_channels']} latent channels, text of width {width}; the data "
            f"has {latent_shape[0]} and {text_shape[-1]}: prepare with the teacher's own codec"
        )
    halvings = 2 ** (len(net["block_out_channels"]) - 1) if is_unet else 1
    patch = (1, halvings, halvings) if is_unet else tuple(net["patch_size"])
    if any(size % step for size, step in zip(latent_shape[1:], patch, strict=True)):
        raise StaleArtifact(
            f"latents of (frames, height, width) {tuple(latent_shape[1:])} do not divide into the teacher's "
            f"patches of {patch}: prepare with other num_frames, height or width"
        )


def load_schedule(path: str | Path) -> Schedule:
    """Return the path that a teacher was trained on. Raises what `read_schedule` raises."""
    return schedule_from_dict(read_schedule(path))


def read_schedule(path: str | Path) -> dict[str, Any]:
    """Return the settings of a teacher's noise schedule in diffusers' words; none for Wan's rectified flow.

    A U-Net's scheduler_config.json is looked for in its folder and, as diffusers' pipelines lay it out, in
    scheduler/ below and beside it. Raises MissingArtifact, and InvalidValue for a schedule not known here.
    """
    folder = Path(path)
    if _kind(folder) not in UNETS:
        return {}
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER, folder.parent / "scheduler" / SCHEDULER]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise MissingArtifact(
            f"no {SCHEDULER} in, below or beside {folder}: copy the scheduler folder of its pipeline"
        )
    about = json.loads(found.read_bytes())
    for name, known in KNOWN.items():
        if about.get(name) not in known:
            listed = ", ".join(str(one) for one in known)
            raise InvalidValue(f"{found}: {name}", about.get(name), f"known here: {listed}")
    return {name: about[name] for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}


def schedule_from_dict(values: Mapping[str, Any]) -> Schedule:
    """Make the schedule that `read_schedule` describes."""
    if not values:
        return RECTIFIED_FLOW
    make = BETAS[values["beta_schedule"]]
    prediction = PREDICTIONS[values["prediction_type"]]
    return make(values["beta_start"], values["beta_end"], TIMESTEPS, prediction)
