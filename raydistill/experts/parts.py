"""Weights and optimizer states of one role as safetensors, one file per rank.

Whole tensors, dealt out to the ranks by name: nothing is unpickled on the way back, and what N workers wrote
at one ZeRO stage, M workers read at another.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raydistill.artifacts import MANIFEST, Manifest
from raydistill.errors import IncompatibleCheckpoint

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter: float32 master weight, first and second moment."""


def part_name(rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def save_parts(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, step: int, rank: int, world_size: int
) -> None:
    """Write this rank's share.

    Every rank passes the same names in the same order; making a tensor may be collective.
    """
    mine = {}
    for position, (key, tensor) in enumerate(tensors):
        if position % world_size == rank:
            mine[key] = tensor.detach().to("cpu", copy=True).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(mine, folder / part_name(rank, world_size), {"step": json.dumps(step)})


class Parts:
    """All ranks' parts, read lazily. Raises IncompatibleCheckpoint where they are not a whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files, steps = {}, set()
        paths = _paths(folder)
        for path in paths:
            try:
                opened = safe_open(path, "pt")
            except SafetensorError as broken:
                raise IncompatibleCheckpoint(f"{path} is not a part of a checkpoint: {broken}") from broken
            steps.add(json.loads((opened.metadata() or {}).get("step", "null")))
            self._files |= dict.fromkeys(opened.keys(), opened)
        if len(steps) != 1 or int(paths[0].stem.rpartition("-")[2]) != len(paths):
            raise IncompatibleCheckpoint(
                f"{folder}: {len(paths)} parts, steps {steps or 'none'}: not one whole save"
            )
        self.step: int = steps.pop()

    def require(self, shapes: dict[str, torch.Size], kind: str = KINDS[0]) -> None:
        """Compare names and shapes of one kind with the module's. Raises IncompatibleCheckpoint."""
        prefix = f"{kind}/"
        kept = {k.removeprefix(prefix): tuple(f.get_slice(k).get_shape()) for k, f in self._files.items()
                if k.startswith(prefix)}  # fmt: skip
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        wrong = sorted(name for name in {*kept, *wanted} if kept.get(name) != wanted.get(name))
        if wrong:
            first = wrong[0]
            raise IncompatibleCheckpoint(
                f"{self.folder} holds other trainable weights: {len(wrong)} differ, first '{first}': "
                f"{kept.get(first, 'absent')} saved, {wanted.get(first, 'absent')} here"
            )

    def get(self, kind: str, name: str) -> Tensor:
        """Return one whole float32 tensor on the CPU."""
        return self._files[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")


def _paths(folder: Path) -> list[Path]:
    """Return the parts that the checkpoint's manifest names; outside a checkpoint, those that are there.

    On network storage a listing may be older than the files.
    """
    if not (folder.parent / MANIFEST).is_file():
        return sorted(folder.glob("part-*-of-*.safetensors"))
    names = Manifest.read(folder.parent).files
    return sorted(folder.parent / name for name in names if name.startswith(f"{folder.name}/part-"))
