"""Put a student, its codec and what else it needs into one folder: for the server, or for diffusers.

    python jobs/export.py --config jobs/tiny/export.yaml
    python jobs/export.py --config jobs/tiny/export.yaml teacher=FOLDER scores=runs/tiny/evaluation
    python jobs/export.py student=RUN/student teacher=PIPELINE pipeline=RUN/pipeline license=apache-2.0

The same command again does nothing; what else is in a folder is never overwritten.
"""

import sys

from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line, read_early, run

if __name__ == "__main__":
    read_early(ExportConfig)

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydistill.artifacts import tree_digest
from raydistill.consistency.schedule import SAME_TIME
from raydistill.errors import ArtifactError, disk_full_explained
from raydistill.models.folders import located, read_index
from raydistill.pipelines.folder import Wanted, export_pipeline
from raydistill.service.bundle import BundleCard
from raydistill.service.export import export_bundle, plan_card
from raydistill.service.scores import read_scores
from raydistill.student import read_card

SMALL_WORLD = "raydistill/world/weights/codec"


def plan_line(card: BundleCard, name: str) -> str:
    """Steps, passes and experts of a plan, and what was measured."""
    plan = card.plans[name]
    line = f"  plan {name}: steps {plan.num_steps}, passes {plan.passes}, {' + '.join(plan.experts)}"
    if name == card.default_plan:
        line += " (default)"
    if (scores := card.scores.get(name)) is not None:
        seeds = f", mean of {scores['num_seeds']} trainings" if scores["num_seeds"] > 1 else ""
        line += f"; measured on {scores['num_clips']} clips{seeds}"
    return line


def bundle(config: ExportConfig) -> None:
    """Write the bundle, and say what is in it."""
    output = Path(config.output)
    with disk_full_explained(output, ArtifactError):
        made = export_bundle(
            config.student,
            codec_of(config),
            output,
            name=config.bundle_name,
            fps=config.fps,
            teacher=config.teacher or None,
            teacher_steps=config.teacher_steps,
            sizes=config.sizes,
            scores=config.scores or None,
            default_plan=config.default_plan or None,
            text=config.text or None,
            device=config.device,
            preview=config.preview,
        )
    card = made.card
    print(f"{output}: {card.label}, {megabytes(output)}{'' if made.written else ', was there already'}")
    for name in card.plans:
        print(plan_line(card, name))
    for shape in card.shapes:
        print(f"  size {shape}, {shape.frames / card.fps:g} s")
    if card.preview is not None:
        print(f"  previews without the codec: R2 {card.preview['r2']:.2f}")
    for line in made.left_out:
        print(f"  left out: {line}")
    print(f"  digest {card.digest}")


def pipeline(config: ExportConfig) -> None:
    """Write the folder for diffusers, and say what is in it."""
    output = Path(config.pipeline)
    asked = Wanted(
        name=config.bundle_name,
        fps=config.fps,
        plan=config.pipeline_plan,
        path=config.pipeline_path,
        license=config.license,
        scores=scores_of(config),
    )
    with disk_full_explained(output, ArtifactError):
        made = export_pipeline(config.student, config.teacher, output, asked)
    print(f"{output}: {made.kind}, {megabytes(output)}{'' if made.written else ', was there already'}")
    print(f"  t = {', '.join(f'{t:.6g}' for t in made.steps.times)}, {made.steps.plan.path}")
    if max(abs(a - b) for a, b in zip(made.steps.times, made.steps.bare, strict=True)) > SAME_TIME:
        print(f"  by the scheduler's config alone {', '.join(f'{t:.6g}' for t in made.steps.bare)}")
    if made.comfyui is not None:
        print(f"  for ComfyUI: {made.comfyui}")
    print(f"  how to sample: {output / 'README.md'}")


def codec_of(config: ExportConfig) -> str:
    """The codec, or where none is named, that of the teacher's pipeline, or the small world's."""
    if config.codec:
        return config.codec
    whole = config.teacher and read_index(located(config.teacher, weights=False))
    return config.teacher if whole else SMALL_WORLD


def scores_of(config: ExportConfig) -> Mapping[str, Any]:
    """What an evaluation measured of the student's plans."""
    if not config.scores:
        return {}
    card, plans = read_card(Path(config.student))
    cards = {name: plan_card(plan, card) for name, plan in plans.items()}
    sources = {**card.sources, "student": tree_digest(config.student)}
    return read_scores(config.scores, sources, cards, card.guidance_scale)


def megabytes(folder: Path) -> str:
    """Size of all files."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def main() -> None:
    """Export what was asked for."""
    config, _ = from_command_line(ExportConfig, sys.argv[1:])
    if config.pipeline:
        pipeline(config)
    if config.output:
        bundle(config)


if __name__ == "__main__":
    run(main)
