"""Teachers by what their folder holds: diffusers' video networks and their noise schedules."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from raydistill.consistency.schedule import RECTIFIED_FLOW, Schedule, VariancePreserving
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact
from raydistill.models.cogvideox import CogVideoXField
from raydistill.models.folders import boundary_ratio, network_folders
from raydistill.models.hunyuan import HunyuanField
from raydistill.models.pair import PairField
from raydistill.models.unet import TIMESTEPS, UNetField
from raydistill.models.wan import WanField

logger = logging.getLogger(__name__)

Transformer = WanField | HunyuanField | CogVideoXField
"""Adapters with hidden maps that a critic can look at."""
Teacher = Transformer | UNetField
KINDS: dict[str, tuple[Any, type[Teacher]]] = {
    "WanTransformer3DModel": (WanTransformer3DModel, WanField),
    "HunyuanVideoTransformer3DModel": (HunyuanVideoTransformer3DModel, HunyuanField),
    "CogVideoXTransformer3DModel": (CogVideoXTransformer3DModel, CogVideoXField),
    "UNet3DConditionModel": (UNet3DConditionModel, UNetField),
    "UNetMotionModel": (UNetMotionModel, UNetField),
}
FLOWS = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel")
"""Networks on rectified flow; the others have a variance-preserving schedule."""
SCHEDULER = "scheduler_config.json"
PREDICTIONS: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
BETAS = {"linear": VariancePreserving.linear, "scaled_linear": VariancePreserving.scaled_linear}
KNOWN = {"beta_schedule": BETAS, "prediction_type": PREDICTIONS, "num_train_timesteps": (TIMESTEPS,)}
OPTIONS = {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": False}
"""Further settings of a schedule, and what they are where a scheduler's class has none."""


def _kind(folder: Path) -> str:
    """Class of the network in a folder. Raises MissingArtifact for any that is not known."""
    try:
        kind = json.loads((folder / "config.json").read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = repr(error)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise MissingArtifact(
            f"no teacher at {folder}: expected the folder of a pipeline of diffusers, or of a {known}; "
            f"found {kind}"
        )
    return kind


def _folder(path: str | Path, expert: str | None, *, weights: bool = False) -> Path:
    """Folder of an expert's network: of a pipeline with two the second is the detail expert's."""
    folders = network_folders(path, weights=weights)
    return folders[-1] if expert == "detail" else folders[0]


def _field(kind: str, network: Any, guidance_scale: float | None) -> Teacher:
    teacher = KINDS[kind][1](network).eval()
    if guidance_scale is not None and isinstance(teacher, HunyuanField):
        teacher.guidance = guidance_scale
    return teacher


def load_teacher(path: str | Path, expert: str | None = None, guidance_scale: float | None = None) -> Teacher:
    """Load a network in float32, safetensors only: its folder, that of a pipeline, or a pipeline on the hub.

    `expert`: 'detail' takes the second network of a pipeline with two, all else the first.
    `guidance_scale` is what networks with embedded guidance are given.
    Raises MissingArtifact; InvalidValue for a variant that is not known.
    """
    folder = _folder(path, expert, weights=True)
    kind = _kind(folder)
    try:
        loaded = KINDS[kind][0].from_pretrained(folder, use_safetensors=True)
    except OSError as without:
        do = "convert them, pickled ones are never read"
        if not Path(path).exists():
            do = (
                f"'{path}' is in the hub's cache in part, as after --plan: fetch it with HF_HUB_OFFLINE unset"
            )
        raise MissingArtifact(f"{folder} has no safetensors weights: {do} ({without})") from without
    return _field(kind, loaded, guidance_scale)


def empty_teacher(
    path: str | Path, expert: str | None = None, guidance_scale: float | None = None
) -> Teacher:
    """Make a network of its config alone, see `load_teacher`: for counting, under fake tensors."""
    folder = _folder(path, expert)
    kind = _kind(folder)
    return _field(kind, _of_config(kind, folder), guidance_scale)


def load_frozen(
    path: str | Path,
    expert: str | None = None,
    guidance_scale: float | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    take: Callable[[nn.Parameter], None] = lambda _: None,
) -> Teacher:
    """Load a network that nothing trains onto a device, parameters in `dtype`; otherwise as `load_teacher`.

    They are read one at a time, in an order that is the same everywhere, and each is handed to `take`, which
    may put a share in its place: so never more is held than what is kept, and one tensor. Buffers keep their
    own dtype. Weights whose names diffusers must translate first are loaded by it, whole.
    """
    folder = _folder(path, expert, weights=True)
    kind, files = _kind(folder), _opened(folder)
    with init_empty_weights():  # parameters alone: tables that no file holds are computed as ever
        network = _of_config(kind, folder)
    if files.keys() != network.state_dict().keys():
        if files:
            logger.warning("%s has other names than its network: it is loaded whole first", folder)
        network = load_teacher(path, expert, guidance_scale).network
        files = {}
        for _, parameter in sorted(network.named_parameters()):  # in the same order as below, on every worker
            parameter.requires_grad_(False).data = parameter.data.to(device, dtype)
            take(parameter)
    for name in sorted(files):
        owner, _, leaf = name.rpartition(".")
        layer, value = network.get_submodule(owner), files[name].get_tensor(name)
        if (buffer := layer._buffers.get(leaf)) is not None:
            buffer.copy_(value)
            continue
        layer._parameters[leaf] = parameter = nn.Parameter(value.to(device, dtype), requires_grad=False)
        del value
        take(parameter)
    for layer in network.modules():
        layer._buffers = {n: x if x is None else x.to(device) for n, x in layer._buffers.items()}
    return _field(kind, network, guidance_scale)


def _of_config(kind: str, folder: Path) -> Any:
    """Make a network without its weights."""
    network = KINDS[kind][0]
    return network.from_config(cast(dict[str, Any], network.load_config(folder)))


def _opened(folder: Path) -> dict[str, Any]:
    """Each tensor's open file, by the tensor's name; none where a folder has no safetensors."""
    paths = [folder / SAFETENSORS_WEIGHTS_NAME]
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        paths = [folder / name for name in {*json.loads(index.read_bytes())["weight_map"].values()}]
    files = [safe_open(path, "pt") for path in paths if path.is_file()]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def load_whole_teacher(path: str | Path, guidance_scale: float | None = None) -> Teacher | PairField:
    """Load a teacher as its pipeline samples with it: of two networks both. Otherwise as `load_teacher`."""
    if (ratio := boundary_ratio(path)) is None:
        return load_teacher(path, guidance_scale=guidance_scale)
    high, low = (load_teacher(path, expert) for expert in ("semantic", "detail"))
    if not isinstance(high, WanField) or not isinstance(low, WanField):
        raise MissingArtifact(f"{path} has two networks that are not Wan's")
    return PairField(high, low, ratio)


def read_teacher_config(path: str | Path) -> Mapping[str, Any]:
    """Return a teacher's sizes without its weights, defaults included. Raises MissingArtifact."""
    return _empty(network_folders(path)[0]).config


def empty_network(path: str | Path) -> Any:
    """Make a teacher's network without weights, of two the first. Raises MissingArtifact."""
    return _empty(network_folders(path)[0])


def _empty(folder: Path) -> Any:
    """Make a network without weights or tables, for its shapes."""
    with torch.device("meta"):
        return _of_config(_kind(folder), folder)


def require_fit(path: str | Path, latent_shape: Sequence[int], text_shape: Sequence[int]) -> None:
    """Compare one sample's latents (c, f, h, w) and text (l, d) with what a teacher takes.

    Raises StaleArtifact for other channels, another width or length of text, or sizes that its patches or
    levels do not divide; InvalidValue for a variant of the network that is not known.
    """
    folder = network_folders(path)[0]
    field = KINDS[_kind(folder)][1](_empty(folder))
    net = field.network.config
    channels, width, patch = field.sizes(net)
    if (channels, width) != (latent_shape[0], text_shape[-1]):
        raise StaleArtifact(
            f"{path} takes {channels} latent channels, text of width {width}; the data "
            f"has {latent_shape[0]} and {text_shape[-1]}: prepare with the teacher's own codec"
        )
    fixed = None if net.get("use_rotary_positional_embeddings", True) else net["max_text_seq_length"]
    if fixed not in (None, text_shape[0]):
        raise StaleArtifact(
            f"{path} takes texts of {fixed} tokens, the data has {text_shape[0]}: prepare again"
        )
    if any(size % step for size, step in zip(latent_shape[1:], patch, strict=True)):
        raise StaleArtifact(
            f"latents of (frames, height, width) {tuple(latent_shape[1:])} do not divide into the teacher's "
            f"patches of {patch}: prepare with other num_frames, height or width"
        )


def is_unet(path: str | Path) -> bool:
    """Whether a teacher is a U-Net, read from its config."""
    return "UNet" in _kind(network_folders(path)[0])


def embeds_guidance(path: str | Path) -> bool:
    """Whether guidance is an input of the teacher, and no second pass: read from its config."""
    return bool(read_teacher_config(path).get("guidance_embeds", False))


def load_schedule(path: str | Path) -> Schedule:
    """Return the path that a teacher was trained on. Raises what `read_schedule` raises."""
    return schedule_from_dict(read_schedule(path))


def read_schedule(path: str | Path) -> dict[str, Any]:
    """Return the settings of a teacher's noise schedule in diffusers' words; none for rectified flow.

    The scheduler_config.json is looked for in the network's folder and, as pipelines lay it out, in
    scheduler/ below and beside it. Raises MissingArtifact, and InvalidValue for a schedule not known here.
    """
    folder = network_folders(path)[0]
    if _kind(folder) in FLOWS:
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
    if "CogVideoX" in str(about.get("_class_name")):
        about.setdefault("snr_shift_scale", 3.0)  # its class's own default
    kept = {name: about[name] for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}
    return kept | {name: about[name] for name, plain in OPTIONS.items() if about.get(name, plain) != plain}


def schedule_from_dict(values: Mapping[str, Any]) -> Schedule:
    """Make the schedule that `read_schedule` describes."""
    if not values:
        return RECTIFIED_FLOW
    make = BETAS[values["beta_schedule"]]
    prediction = PREDICTIONS[values["prediction_type"]]
    plain = make(values["beta_start"], values["beta_end"], TIMESTEPS, prediction)
    return plain.with_less_signal(
        values.get("snr_shift_scale", 1.0), zero_terminal=values.get("rescale_betas_zero_snr", False)
    )
