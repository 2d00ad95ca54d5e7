"""Put a student, its codec and what else it needs into one folder that the server loads.

    python jobs/export.py --config jobs/tiny/export.yaml
    python jobs/export.py --config jobs/tiny/export.yaml teacher=FOLDER scores=runs/tiny/evaluation

The same command again does nothing; another bundle in the output folder is never overwritten.
"""

import sys

from raydistill.config.export import ExportConfig
from raydistill.config.load import from_command_line, read_early, run

if __name__ == "__main__":
    read_early(ExportConfig)

from pathlib import Path

from raydistill.errors import ArtifactError, disk_full_explained
from raydistill.service.bundle import BundleCard
from raydistill.service.export import export_bundle


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


def main() -> None:
    """Export, and say what is in the folder."""
    config, _ = from_command_line(ExportConfig, sys.argv[1:])
    output = Path(config.output)
    with disk_full_explained(output, ArtifactError):
        made = export_bundle(
            config.student,
            config.codec,
            output,
            name=config.bundle_name,
            fps=config.fps,
            teacher=config.teacher or None,
            teacher_steps=config.teacher_steps,
            sizes=config.sizes,
            scores=config.scores or None,
            default_plan=config.default_plan or None,
        )
    card = made.card
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {card.label}, {size / 1e6:.1f} MB{'' if made.written else ', was there already'}")
    for name in card.plans:
        print(plan_line(card, name))
    for shape in card.shapes:
        print(f"  size {shape}, {shape.frames / card.fps:g} s")
    if card.preview is not None:
        print(f"  previews without the codec: R2 {card.preview['r2']:.2f}")
    for line in made.left_out:
        print(f"  left out: {line}")
    print(f"  digest {card.digest}")


if __name__ == "__main__":
    run(main)
