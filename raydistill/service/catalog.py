"""What is served: bundles by name, and models, each of which is one or more bundles by weight."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydistill.config.serve import model_table
from raydistill.errors import RequestRefused
from raydistill.service.bundle import BundleCard, read_bundle, verify_bundle


@dataclass(frozen=True)
class Catalog:
    """Cards of the bundles, and the weights by which models choose among them."""

    cards: Mapping[str, BundleCard]
    models: Mapping[str, Mapping[str, float]]

    @staticmethod
    def read(bundles: Mapping[str, str], models: Mapping[str, Mapping[str, float]]) -> "Catalog":
        """Read the cards. Raises what `read_bundle` and `model_table` raise."""
        table = model_table(models, bundles)
        return Catalog({name: read_bundle(folder) for name, folder in bundles.items()}, table)

    @staticmethod
    def verified(
        bundles: Mapping[str, str], models: Mapping[str, Mapping[str, float]], known: "Catalog"
    ) -> "Catalog":
        """Read the cards, and all files of those that are not `known`. Raises what `verify_bundle` raises."""
        new = Catalog.read(bundles, models)
        for name, card in new.cards.items():
            if card.label not in known.labels:
                verify_bundle(bundles[name])
        return new

    @property
    def labels(self) -> tuple[str, ...]:
        """Bundles as jobs name them: a folder whose contents changed is another one."""
        return tuple(card.label for card in self.cards.values())

    def model(self, name: str | None) -> str:
        """Return a model's name, the first for None. Raises RequestRefused (404)."""
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            raise RequestRefused(
                404, "model_not_found", f"no model {name[:80]!r}; there are: {known}", "model"
            )
        return name

    def choose(self, model: str, job: str) -> BundleCard:
        """Return the bundle that makes this job's video: by weight, and the same whoever asks."""
        weights = self.models[model]
        at = int.from_bytes(hashlib.sha256(job.encode()).digest()[:8], "big") / 2**64 * sum(weights.values())
        for name, weight in weights.items():
            if weight and at < weight:
                return self.cards[name]
            at -= weight
        return self.cards[max(weights, key=lambda name: weights[name])]  # the last digit of the sum

    def listing(self) -> list[dict[str, Any]]:
        """Models as GET /v1/models shows them."""
        return [self.shown(name) for name in self.models]

    def shown(self, model: str) -> dict[str, Any]:
        """One model, with what may be asked of it; of several versions the heaviest one's."""
        weights = self.models[model]
        card = self.cards[max(weights, key=lambda name: weights[name])]
        plans = {
            name: {"num_steps": plan.num_steps, "passes": plan.passes, "experts": list(plan.experts)}
            for name, plan in card.plans.items()
        }
        shapes = [{"size": f"{one.width}x{one.height}", "num_frames": one.frames} for one in card.shapes]
        about = {
            "steps": list(card.steps),
            "plans": plans,
            "default_plan": card.default_plan,
            "shapes": shapes,
            "fps": card.fps,
            "kind": card.kind,
            "flow_shift": card.shift,
            "boundary_ratio": card.boundary,
            "scores": card.scores,
            "bundles": {self.cards[name].label: weight for name, weight in weights.items()},
        }
        return {"id": model, "object": "model", "created": 0, "owned_by": "raydistill", "x_raydistill": about}
