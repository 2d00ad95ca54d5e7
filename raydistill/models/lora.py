"""LoRA over a network that others use too (MCM's student; the branch of DCM's detail expert).

The branches are in a second module tree that *shares* all weights of the first: nothing is switched on or
off, so the network below cannot change, and memory holds it once.
"""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.loaders import (
    CogVideoXLoraLoaderMixin,
    HunyuanVideoLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    WanLoraLoaderMixin,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.models.cogvideox import CogVideoXField
from raydistill.models.hunyuan import HunyuanField
from raydistill.models.teacher import Teacher
from raydistill.models.wan import WanField

Field = TypeVar("Field", bound=nn.Module)

FILE = "pytorch_lora_weights.safetensors"
"""As diffusers' pipelines look for it."""
MOTION = "motion"
"""Name of the adapter."""
PIPELINES: dict[type[Teacher], Any] = {
    WanField: WanLoraLoaderMixin,
    HunyuanField: HunyuanVideoLoraLoaderMixin,
    CogVideoXField: CogVideoXLoraLoaderMixin,
}
"""What saves a LoRA as the teacher's pipeline loads it; U-Nets have Stable Diffusion's."""


def add_lora(teacher: Teacher, rank: int, alpha: float, seed: int) -> Teacher:
    """Build a LoRA student over `teacher`, which is frozen here; at first both compute the same, bit for bit.

    Only the branches require gradients. `seed` draws their A matrices; B starts at zero.
    """
    teacher.requires_grad_(False)
    student = shared_copy(teacher)
    attach(student.network, targets_of(student), rank, alpha, seed=seed, name=MOTION)
    return student


def shared_copy(field: Field) -> Field:
    """Copy the modules of a network, not its weights and buffers."""
    return copy.deepcopy(field, {id(x): x for x in (*field.parameters(), *field.buffers())})


def targets_of(field: Teacher) -> list[str]:
    """Full names of the layers that a LoRA over the whole path adapts (of U-Nets: MCM's).

    ModelScopeT2V's convolutions over time are left out, as in MCM: no suffix names them. So are the
    projections around AnimateDiff's motion modules, which diffusers calls with an argument that peft's layers
    refuse.
    """
    ends = tuple(f".{suffix}" for suffix in field.adapted)
    found = [
        name
        for name, module in field.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f".{name}".endswith(ends)
    ]
    refused = ("proj_in", "proj_out")
    return [name for name in found if not ("motion_modules" in name and name.endswith(refused))]


def attach(
    network: nn.Module, targets: Sequence[str], rank: int, alpha: float, *, seed: int, name: str
) -> None:
    """Put LoRA branches on the layers of these names or suffixes; only they require gradients then."""
    network.requires_grad_(False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # A detail expert over a semantic one that is a LoRA has two adapters, and means to.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(targets, rank, alpha), network, adapter_name=name)


def _config(targets: Sequence[str], rank: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=0.0, target_modules=sorted(targets))


@torch.no_grad()
def merge(field: Field) -> Field:
    """Fold all branches into weights of the network's own; in place, for sampling only.

    Equal to the branches up to rounding, and as fast as the network below, whose weights are not touched.
    """
    for place, layer in list(field.named_modules()):
        if isinstance(layer, LoraLayer):
            base = cast(nn.Linear | nn.Conv2d, layer.get_base_layer())
            delta = sum(cast(Any, layer).get_delta_weight(name) for name in layer.lora_A)
            base.weight = nn.Parameter(base.weight + delta, requires_grad=False)  # the tree's own, not shared
            field.set_submodule(place, base)
    return field


def lora_state(student: Teacher) -> dict[str, Tensor]:
    """Return the branches' weights by the names that peft and diffusers save them under."""
    parameters = student.network.named_parameters()
    branches = {n: p.detach() for n, p in parameters if ".lora_" in n and f".{MOTION}." in n}
    return {n.replace(f".{MOTION}.", "."): p for n, p in branches.items()}


def save_lora(student: Teacher, folder: Path, rank: int, alpha: float) -> None:
    """Write FILE so that `load_lora_weights` of diffusers' pipelines takes it, alpha included."""
    state: Any = {name: x.float().cpu().contiguous() for name, x in lora_state(student).items()}
    about = _config(targets_of_lora(student), rank, alpha).to_dict()
    kept = {key: about[key] for key in ("r", "lora_alpha", "target_modules")}
    kept["target_modules"] = sorted(kept["target_modules"])
    pipeline, part = PIPELINES.get(type(student), StableDiffusionLoraLoaderMixin), _part_of(student)
    how = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": kept}
    pipeline.save_lora_weights(folder, **how)


def _part_of(field: Teacher) -> str:
    """Name of the network in its pipeline."""
    return "transformer" if type(field) in PIPELINES else "unet"


def targets_of_lora(student: Teacher) -> list[str]:
    """Full names of the adapted layers."""
    return [name for name, layer in student.network.named_modules() if isinstance(layer, LoraLayer)]


def load_lora(teacher: Teacher, folder: Path, rank: int, alpha: float) -> Teacher:
    """Rebuild what `save_lora` wrote, frozen, over its teacher.

    Raises MissingArtifact without FILE, CorruptArtifact for other layers, another rank or another alpha.
    """
    path, prefix = Path(folder) / FILE, _part_of(teacher)
    if not path.is_file():
        raise MissingArtifact(f"no LoRA at {path}: copy the student again")
    student = add_lora(teacher, rank, alpha, seed=0)
    state = {name.removeprefix(f"{prefix}."): x for name, x in load_file(path).items()}
    own = lora_state(student)
    if own.keys() != state.keys() or any(own[n].shape != state[n].shape for n in own):
        raise CorruptArtifact(f"{path} is not a LoRA of rank {rank} on this teacher's layers")
    if (told := _alpha_in(path, prefix)) not in (None, alpha):
        raise CorruptArtifact(f"{path} was trained with alpha {told}, not {alpha}")
    for name, weight in own.items():
        weight.copy_(state[name])
    return student.requires_grad_(False).eval()


def _alpha_in(path: Path, prefix: str) -> float | None:
    """Alpha as diffusers writes it beside the weights; None where the file has none."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return about.get(f"{prefix}.lora_alpha")
