"""Run a study: train every variant with every seed, measure them together, write a report with intervals.

    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml [key=value ...]
    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml --no-training
    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml --update-docs

Run the same command again after a stop: finished trainings and measurements are kept.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from evaluate import make_setting

from raydistill.artifacts import fingerprint, tree_digest, write_atomically, write_json
from raydistill.config.ablate import AblateConfig
from raydistill.config.distill import DistillConfig
from raydistill.config.evaluate import EvaluateConfig
from raydistill.config.load import dump, from_command_line, run
from raydistill.errors import ArtifactError, DistillError, disk_full_explained
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import build_lineup
from raydistill.evaluation.report import publish_pictures
from raydistill.evaluation.studies import decide
from raydistill.models.text import WordVectors
from raydistill.student import CARD

SWITCHES = {
    "no-training": "measure what is trained already; what is missing is skipped",
    "update-docs": "copy table and pictures to docs/ablation/NAME",
}
DONE = "trained.json"


def run_folder(config: AblateConfig, variant: str, seed: int) -> Path:
    """Where one training lies."""
    return Path(config.output, f"{variant}-{seed}")


def command_of(config: AblateConfig, variant: str, seed: int) -> list[str]:
    """The training's command, after the interpreter."""
    folder = run_folder(config, variant, seed)
    return ["jobs/distill.py", "--config", config.base, *config.asked(variant, seed), f"output={folder}"]


def check(config: AblateConfig) -> None:
    """Read every variant's settings, so that a typo is found before the first training."""
    for variant in config.variants:
        from_command_line(DistillConfig, command_of(config, variant, config.seeds[0])[1:])
    evaluation(config)


def is_trained(config: AblateConfig, variant: str, seed: int) -> bool:
    """Whether this very training is finished: another base or other settings make it another one."""
    folder = run_folder(config, variant, seed)
    try:
        known = json.loads((folder / DONE).read_bytes())["identity"]
    except (OSError, ValueError, KeyError):
        return False
    return known == identity_of(config, variant, seed) and (folder / "student" / CARD).is_file()


def identity_of(config: AblateConfig, variant: str, seed: int) -> str:
    """Digest of what a training was asked for."""
    return fingerprint([tree_digest(config.base), config.asked(variant, seed)])


def train(config: AblateConfig) -> None:
    """Train what is missing, `parallel` at a time, a line for each. Raises DistillError if one fails."""
    every = [(variant, seed) for seed in config.seeds for variant in config.variants]
    todo = [one for one in every if not is_trained(config, *one)]
    print(f"{len(every)} trainings, {len(every) - len(todo)} done before", flush=True)
    with ThreadPoolExecutor(config.parallel) as pool:
        for number, said in enumerate(pool.map(lambda one: train_one(config, *one), todo), 1):
            print(f"[{number}/{len(todo)}] {said}", flush=True)


def train_one(config: AblateConfig, variant: str, seed: int) -> str:
    """One training in a process of its own; its output goes to log.txt in its folder."""
    folder, began = run_folder(config, variant, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, *command_of(config, variant, seed)]
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status:
        last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise DistillError(
            f"{variant}, seed {seed}: exit status {status}: {' '.join(last)}; see {folder}/log.txt"
        )
    write_json(folder / DONE, {"identity": identity_of(config, variant, seed)})
    return f"{variant}, seed {seed}: {time.monotonic() - began:.0f} s"


def evaluation(config: AblateConfig) -> EvaluateConfig:
    """Settings of the measurement: every variant a kind of student."""
    students = {
        variant: [str(run_folder(config, variant, seed) / "student") for seed in config.seeds]
        for variant in config.variants
    }
    given = [f"students={json.dumps(students)}", f"output={config.output}/evaluation"]
    curves = {
        variant: f"{run_folder(config, variant, config.seeds[0])}/metrics.jsonl" for variant in students
    }
    given += [f"metrics={json.dumps(curves)}", "latency.rounds=0"]
    return from_command_line(EvaluateConfig, ["--config", config.evaluate, *config.evaluate_shared, *given])[
        0
    ]


def commit() -> str:
    """The code's commit, with a mark where the working tree differs."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def report(config: AblateConfig) -> tuple[str, dict[str, bytes]]:
    """Measure all students; return the study's table and pictures."""
    asked = evaluation(config)
    torch.set_num_threads(asked.threads)
    lineup = build_lineup(asked, WordVectors()([""])[0])
    anchor = lineup.anchor.label if lineup.anchor else "teacher"
    more = {
        "lead": config.question,
        "columns": list(config.columns),
        "variants": config.as_dict(),
        "base": config.base,
        "seeds": list(config.seeds),
        "commit": commit(),
        "command": f"python jobs/ablate.py {' '.join(sys.argv[1:])}",
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} CPUs",
    }
    made = build_report(
        asked,
        make_setting(asked),
        lineup,
        decide=lambda rows: decide(rows, config.compare, anchor),
        more=more,
    )
    table = (Path(asked.output) / "report" / "table.md").read_text(encoding="utf-8")
    for one in made.results["skipped"]:
        print(f"skipped {one['what']}: {one['reason']}")
    return page(config, table, more), made.pictures


def page(config: AblateConfig, table: str, more: dict[str, object]) -> str:
    """The study as Markdown: question, variants, table, decisions, and how it was made."""
    variants = [f"* `{name}`: `{settings}`" for name, settings in config.as_dict().items()]
    made = f"`{more['command']}` at {more['commit']}, seeds {more['seeds']}, on {more['machine']}."
    parts = [f"# {config.name}", config.question, "\n".join(variants), table.strip(), made]
    pictures = "![frames](strips.png)\n![losses](losses.png)"
    return "\n\n".join([*parts, pictures]) + "\n"


def main() -> None:
    """Check, train, measure."""
    config, switches = from_command_line(AblateConfig, sys.argv[1:], switches=SWITCHES)
    check(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with disk_full_explained(output, ArtifactError):
        dump(config, output / "config.yaml")
        if "no-training" not in switches:
            train(config)
        text, pictures = report(config)
        write_atomically(output / "study.md", text.encode())
        if "update-docs" in switches:
            docs = Path("docs", "ablation", config.name)
            publish_pictures({k: v for k, v in pictures.items() if k in ("strips", "losses")}, docs)
            write_atomically(docs / "README.md", text.encode())
    print(text)
    print(f"report: {output}/evaluation/report.html")


if __name__ == "__main__":
    run(main)
