"""Run a study: train every variant with every seed, measure them together, write a report with intervals.

    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml [key=value ...]
    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml --no-training
    python jobs/ablate.py --config jobs/tiny/ablation/components.yaml --update-docs

Run the same command again after a stop: finished trainings and measurements are kept.
"""

import sys

from raydistill.config.ablate import SWITCHES, AblateConfig
from raydistill.config.load import dump, from_command_line, read_early, run

if __name__ == "__main__":
    read_early(AblateConfig, SWITCHES)

import json
import os
import platform
import shlex
import subprocess
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from evaluate import ground
from filelock import FileLock

from raydistill.artifacts import LatentStore, fingerprint, tree_digest, write_atomically, write_json
from raydistill.config.distill import DistillConfig
from raydistill.config.evaluate import EvaluateConfig
from raydistill.errors import (
    ArtifactError,
    ConfigError,
    DistillError,
    InvalidValue,
    disk_full_explained,
)
from raydistill.evaluation.build import build_report
from raydistill.evaluation.measures import BY_NAME
from raydistill.evaluation.report import PICTURES, publish_pictures
from raydistill.evaluation.studies import decide
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.student import CARD
from raydistill.trajectories.store import TrajectoryStore

MADE = "made.json"
SECONDS_BETWEEN_LINES = 30.0
SHOWN = ("quality", "strips", "losses")
"""Pictures on a study's page."""


def run_folder(config: AblateConfig, variant: str, seed: int) -> Path:
    """Where one training lies: named by its settings and by the contents of what it reads.

    So whoever asks for the same shares it, and another teacher in the old one's place makes another training.
    Raises MissingArtifact if what it reads is not there.
    """
    asked = settings_of(config, variant, seed)
    try:
        sources = sources_of(asked)
    except ArtifactError as error:
        error.add_note(f"variant {variant}")
        raise
    wanted = {name: value for name, value in asdict(asked).items() if name != "output"}
    return Path(config.trainings, f"{fingerprint([wanted, sources])[:12]}-{seed}")


def command_of(config: AblateConfig, variant: str, seed: int) -> list[str]:
    """The training's command, after the interpreter."""
    job, folder = str(Path(__file__).with_name("distill.py")), run_folder(config, variant, seed)
    return [job, "--config", config.base, *config.asked(variant, seed), f"output={folder}"]


def settings_of(config: AblateConfig, variant: str, seed: int) -> DistillConfig:
    """Settings of one training, in full. Raises ConfigError's children, which name the variant."""
    try:
        return replace(_read(config.base, *config.shared, *config.variants[variant]), seed=seed)
    except ConfigError as error:
        error.add_note(f"variant {variant}")
        raise


@cache
def _read(base: str, *pairs: str) -> DistillConfig:
    return from_command_line(DistillConfig, ["--config", base, *pairs])[0]


def check(config: AblateConfig) -> None:
    """Read every setting, so that a typo is found before any training. Raises ConfigError's children."""
    for variant in config.variants:
        settings_of(config, variant, config.seeds[0])
    require_measured(config, measurement(config))


def require_measured(config: AblateConfig, measured: EvaluateConfig) -> None:
    """Refuse a study that shows or compares what will not be measured. Raises InvalidValue."""
    for key, names in (("columns", config.columns), ("compare", [one.measure for one in config.compare])):
        for name in names:
            _one_of(key, name, BY_NAME)
    for one in config.compare:
        _one_of("compare", one.num_steps, measured.student_steps)
        teachers = {one.left, one.right} - set(config.variants)
        for name in teachers:
            _one_of("compare", name, ("teacher", *measured.more_teachers))
        if teachers and not measured.teacher_steps:
            raise InvalidValue("teacher_steps", (), "one or more: a comparison asks for the teacher")


def _one_of(key: str, value: str | int, known: Collection[str] | Collection[int]) -> None:
    if value not in known:
        raise InvalidValue(key, value, f"one of {', '.join(map(str, known))}")


def is_trained(config: AblateConfig, variant: str, seed: int) -> bool:
    """Whether this very training is finished: the card is the last that a student gets."""
    return (run_folder(config, variant, seed) / "student" / CARD).is_file()


def sources_of(asked: DistillConfig) -> dict[str, str]:
    """Digests of what a training reads."""
    found = {"teacher": teacher_digest(asked.teacher), "codec": codec_digest(asked.codec)}
    found["latents"] = LatentStore(asked.data).fingerprint
    if asked.images:
        found["images"] = LatentStore(asked.images).fingerprint
    if asked.mix.trajectories:
        found["trajectories"] = TrajectoryStore(asked.mix.trajectories).fingerprint
    for name in asked.stages:
        if asked.stage(name).objective.appearance:
            found[f"{name}_features"] = tree_digest(asked.stage(name).appearance.features)
    return found


def make_inputs(config: AblateConfig) -> None:
    """Run the jobs that the study names first. Raises DistillError if one fails."""
    for script, *given in config.commands_before:
        print(f"python {shlex.join([script, *given])}", flush=True)
        job = Path(__file__).parents[1] / script
        if status := subprocess.run([sys.executable, str(job), *given], check=False).returncode:
            raise DistillError(f"{script} ended with exit status {status}: see above")


def train(config: AblateConfig) -> None:
    """Train what is missing, `parallel` at a time, a line for each.

    Raises DistillError if one fails: those that run go on to their end, no other is begun.
    """
    every = [(variant, seed) for seed in config.seeds for variant in config.variants]
    todo = [one for one in every if not is_trained(config, *one)]
    print(f"{len(every)} trainings, {len(every) - len(todo)} done before", flush=True)
    failed = threading.Event()

    def attempt(one: tuple[str, int]) -> str:
        if failed.is_set():
            return "not begun"  # unseen: the error of the one that failed is raised before
        try:
            return train_one(config, *one)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(config.parallel) as pool:
        for number, said in enumerate(pool.map(attempt, todo), 1):
            print(f"[{number}/{len(todo)}] {said}", flush=True)


def train_one(config: AblateConfig, variant: str, seed: int) -> str:
    """One training in a process of its own; its output goes to log.txt in its folder.

    Waits for another study that is at the same training.
    """
    folder, began = run_folder(config, variant, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".study"):
        print(f"{variant}, seed {seed}: see {folder}/log.txt", flush=True)
        if is_trained(config, variant, seed):
            return f"{variant}, seed {seed}: trained meanwhile"
        command = [sys.executable, *command_of(config, variant, seed)]
        if status := run_logged(command, folder / "log.txt", f"{variant}, seed {seed}"):
            last = last_line(folder / "log.txt")
            raise DistillError(f"{variant}, seed {seed}: exit status {status}: {last}; see {folder}/log.txt")
        write_json(folder / MADE, {"commit": commit(), "command": command[1:]})
    return f"{variant}, seed {seed}: {time.monotonic() - began:.0f} s"


def run_logged(command: Sequence[str], log: Path, name: str) -> int:
    """Run a command, its output in `log`, and print now and then what the log says last."""
    with open(log, "w", encoding="utf-8") as file:
        process, said = subprocess.Popen(command, stdout=file, stderr=file), ""
        while True:
            try:
                return process.wait(SECONDS_BETWEEN_LINES)
            except subprocess.TimeoutExpired:
                if (line := last_line(log)) != said:
                    said = line
                    print(f"{name}: {line}", flush=True)


def last_line(log: Path) -> str:
    """What a job said last."""
    return next(reversed(log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]), "").strip()


def measurement(config: AblateConfig) -> EvaluateConfig:
    """Settings of the measurement, but for the students."""
    given = [*config.evaluate_shared, f"output={config.output}/evaluation", "latency.rounds=0"]
    given.append(f"records={config.trainings}/records")
    return from_command_line(EvaluateConfig, ["--config", config.evaluate, *given])[0]


def evaluation(config: AblateConfig) -> EvaluateConfig:
    """Settings of the measurement: every variant a kind of student, and no other student."""
    folders = {
        variant: [run_folder(config, variant, seed) for seed in config.seeds] for variant in config.variants
    }
    return replace(
        measurement(config),
        students={variant: [f"{one}/student" for one in every] for variant, every in folders.items()},
        metrics={variant: f"{every[0]}/metrics.jsonl" for variant, every in folders.items()},
    )


def commits_of(config: AblateConfig) -> list[str]:
    """The code's commits that the trainings were done at."""
    every = (run_folder(config, variant, seed) / MADE for variant in config.variants for seed in config.seeds)
    return sorted({json.loads(one.read_bytes())["commit"] for one in every if one.is_file()})


def commit() -> str:
    """The code's commit, with a mark where the code differs from it; `unknown` where there is no git."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        name = subprocess.check_output(
            [*git, "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "raydistill", "jobs"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("-dirty" if changed.returncode else "")


def report(config: AblateConfig) -> tuple[str, dict[str, bytes]]:
    """Measure all students; return the study's page, for a folder that holds its pictures, and these."""
    asked = evaluation(config)
    torch.set_num_threads(asked.threads)
    setting, lineup = ground(asked)
    anchors = {"teacher": "teacher"} | {name: one.label for name, one in lineup.anchors.items()}
    more = {
        "lead": config.question,
        "columns": list(config.columns),
        "variants": config.as_dict(),
        "base": config.base,
        "seeds": list(config.seeds),
        "commit": commit(),
        "trained_at": commits_of(config),
        "command": f"python jobs/ablate.py {' '.join(sys.argv[1:])}",
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} CPUs",
    }
    made = build_report(
        asked,
        setting,
        lineup,
        progress,
        decide=lambda rows: decide(rows, config.compare, anchors),
        more=more,
    )
    table = (Path(asked.output) / "report" / "table.md").read_text(encoding="utf-8")
    for one in made.results["skipped"]:
        print(f"skipped {one['what']}: {one['reason']}")
    shown = {name: made.pictures[name] for name in SHOWN if name in made.pictures}
    return page(config, table, more, shown), shown


def progress(title: str, done: int, total: int) -> None:
    """Print a line for each sampler that is measured."""
    if done == total:
        print(title, flush=True)


def page(config: AblateConfig, table: str, more: dict[str, Any], shown: Collection[str]) -> str:
    """The study as Markdown: question, variants, table, decisions, and how it was made."""
    variants = [f"* `{name}`: `{settings}`" for name, settings in config.as_dict().items()]
    made = (
        f"`{more['command']}` at {more['commit']}, trained at {', '.join(more['trained_at'])}, "
        f"seeds {more['seeds']}, on {more['machine']}."
    )
    parts = [f"# {config.name}", config.question, "\n".join(variants), table.strip(), made]
    pictures = [f"![{name}]({PICTURES[name]})" for name in shown]
    return "\n\n".join([*parts, *pictures]) + "\n"


def main() -> None:
    """Check, train, measure."""
    config, switches = from_command_line(AblateConfig, sys.argv[1:], switches=SWITCHES)
    check(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with disk_full_explained(output, ArtifactError):
        dump(config, output / "config.yaml")
        if "no-training" not in switches:
            make_inputs(config)
            train(config)
        text, pictures = report(config)
        study = output / "evaluation" / "report" / "study.md"  # beside its pictures
        write_atomically(study, text.encode())
        if "update-docs" in switches:
            docs = Path("docs", "ablation", config.name)
            publish_pictures(pictures, docs)
            write_atomically(docs / "README.md", text.encode())
    print(text)
    print(f"report: {output}/evaluation/report.html")


if __name__ == "__main__":
    run(main)
