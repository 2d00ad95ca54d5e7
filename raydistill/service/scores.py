"""What an evaluation measured of a student, plan by plan, for its bundle's card. Reads results.json alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydistill.errors import CorruptArtifact, MissingArtifact, StaleArtifact
from raydistill.service.bundle import TEACHER, PlanCard

RESULTS, VERSION = "results.json", 1


def read_scores(
    folder: str | Path, sources: Mapping[str, Any], plans: Mapping[str, PlanCard], guidance_scale: float
) -> dict[str, dict[str, Any]]:
    """Figures of each plan that an evaluation measured, in the form of `BundleCard.scores`.

    folder: what jobs/evaluate.py or jobs/ablate.py wrote. sources: {"student", "codec"} and more, digests of
    folders. A row may average students of several training seeds, of which this must be the first: its digest
    is the one on record. Raises MissingArtifact, CorruptArtifact; StaleArtifact for an evaluation of another
    student or codec, or of none of these plans.
    """
    path = Path(folder) / RESULTS
    results = _read(path)
    try:
        settings = results["settings"]
        if settings["setting"]["codec"] != sources["codec"]:
            raise StaleArtifact(f"{path} was measured through another codec: evaluate with this one")
        rows = [(row, settings["weights"].get(row["label"], {})) for row in results["rows"]]
        own = [(row, made) for row, made in rows if made.get("student") == sources["student"]]
        found = {
            name: _figures(row, settings["num_clips"])
            for name, plan in plans.items()
            for row, made in own
            if _is_of(row, made, plan, kinds=settings["students"], guidance_scale=guidance_scale)
        }
    except (KeyError, TypeError, AttributeError) as other:
        raise StaleArtifact(f"{path} is of another release ({other!r}): evaluate again") from other
    if not found:
        what = (
            "a plan of this student as it is stored"
            if own
            else "this student, or not as the first of its kind"
        )
        raise StaleArtifact(f"{path} did not measure {what}: evaluate with students.KIND=[its folder]")
    return found


def _figures(row: Mapping[str, Any], num_clips: int) -> dict[str, Any]:
    figures = row["figures"]
    return {
        "num_clips": num_clips,
        "num_seeds": max(figure["num_seeds"] for figure in figures.values()),
        "figures": {
            name: {part: figure[part] for part in ("value", "low", "high")}
            for name, figure in figures.items()
        },
    }


def _is_of(
    row: Mapping[str, Any],
    made: Mapping[str, Any],
    plan: PlanCard,
    *,
    kinds: Mapping[str, int],
    guidance_scale: float,
) -> bool:
    """Whether a row of the student's is this plan: its times, its networks, the path stored with it."""
    if row["times"] != [*(one["t"] for one in plan.jumps), 0.0]:
        return False
    if TEACHER not in plan.experts:  # on another path than the stored one, the group is no kind
        return TEACHER not in made and row["group"] in kinds
    same_guidance = made.get("guidance_scale") == guidance_scale
    ends_alike = row["label"].endswith("+ tail") == (plan.jumps[-1]["expert"] == TEACHER)
    return TEACHER in made and same_guidance and ends_alike


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_bytes())
        version = results.get("version")
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise MissingArtifact(f"no {path}: name the output folder of jobs/evaluate.py") from missing
    except (ValueError, AttributeError) as broken:
        raise CorruptArtifact(f"{path} is not whole ({broken!r}): evaluate again") from broken
    if version != VERSION:
        raise StaleArtifact(f"{path} is not of version {VERSION}: evaluate again with this release")
    return results
