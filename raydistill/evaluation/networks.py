"""Networks that are loaded when a sampler first asks for them: real ones do not all fit at once."""

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raydistill.config.evaluate import EvaluateConfig
from raydistill.consistency.solver import guided
from raydistill.models.casting import cast_parameters
from raydistill.models.guidance import guide_teacher
from raydistill.models.prompts import PRECISIONS
from raydistill.models.protocols import VelocityField
from raydistill.models.teacher import load_whole_teacher
from raydistill.student import Card, load_student

TEACHER, APART = "teacher", "teacher in two passes"


@dataclass(frozen=True)
class Part:
    """What is loaded together."""

    key: str
    load: Callable[[], Mapping[str, VelocityField]]
    """Fields by their names in this part."""


class Shelf:
    """Loaded parts: all that were ever asked for, or those of one sampler."""

    def __init__(self, *, keeps_all: bool):
        """Nothing is loaded yet."""
        self.keeps_all = keeps_all
        self._held: dict[str, Mapping[str, VelocityField]] = {}

    def take(self, part: Part, beside: Collection[str]) -> Mapping[str, VelocityField]:
        """Return a part's fields, loading them if need be; `beside`: keys that its sampler needs with it."""
        if not self.keeps_all and (idle := self._held.keys() - {part.key, *beside}):
            for key in idle:
                del self._held[key]
            gc.collect()  # before the next one is loaded, not at some later time
        if part.key not in self._held:
            with torch.inference_mode(
                False
            ):  # sampling is in it; weights shall be plain tensors all the same
                self._held[part.key] = part.load()
        return self._held[part.key]


class OnDemand(Mapping[str, VelocityField]):
    """A sampler's fields by expert. Its names are known, and its keys can be listed, without loading."""

    def __init__(self, shelf: Shelf, of: Mapping[str, tuple[Part, str]]):
        """`of` maps an expert to its part and the field's name in it."""
        self.shelf, self.of = shelf, dict(of)

    def __getitem__(self, expert: str) -> VelocityField:
        """Load the expert's part, if it is not there."""
        part, name = self.of[expert]
        return self.shelf.take(part, self.keys_of_parts)[name]

    def __iter__(self) -> Iterator[str]:
        """Names of experts."""
        return iter(self.of)

    def __len__(self) -> int:
        """Count experts."""
        return len(self.of)

    @property
    def keys_of_parts(self) -> frozenset[str]:
        """What must be held at once."""
        return frozenset(part.key for part, _ in self.of.values())


def teacher_part(config: EvaluateConfig, name: str, folder: str, null_text: Float[Tensor, "l d"]) -> Part:
    """Return a guided teacher, all of its networks: under TEACHER, and in two passes a step under APART."""
    scale, second = config.guidance_scale, config.guidance_scale_2 or None

    def load() -> dict[str, VelocityField]:
        network = load_whole_teacher(folder, scale).requires_grad_(False)
        cast_parameters(network, PRECISIONS[config.precision])
        network.to(config.device)
        null = null_text.to(config.device)
        together = guide_teacher(network, null, scale, second)
        return {TEACHER: together, APART: guided(network, null, scale, batched=False)}

    return Part(name, load)


def student_part(config: EvaluateConfig, folder: str, card: Card, teacher: str) -> Part:
    """Return a student's experts; a LoRA is folded into its teacher's weights, which alone are kept."""

    def load() -> dict[str, VelocityField]:
        over = teacher if card.first_lora is not None else None
        dtype = PRECISIONS[config.precision]
        loaded = load_student(folder, over, device=config.device, dtype=dtype).fields
        return {name: field for name, field in loaded.items() if name != TEACHER}

    return Part(f"student {folder}", load)
