"""Measure the teacher, its students and their mixtures on captions held out from training; write a report.

    python jobs/evaluate.py --config jobs/tiny/evaluate.yaml
    python jobs/evaluate.py --config jobs/tiny/evaluate.yaml num_clips=576 --update-readme
    python jobs/evaluate.py --config jobs/wan21_1_3b/evaluate.yaml data=LATENTS features=CLIP num_clips=32

A second run goes on where the first stopped: samplers already measured are read back from <output>/records.
"""

import sys

from raydistill.config.evaluate import SWITCHES, EvaluateConfig
from raydistill.config.load import dump, from_command_line, read_early, run

if __name__ == "__main__":
    read_early(EvaluateConfig, SWITCHES)

import logging
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from raydistill.artifacts import tree_digest
from raydistill.errors import ArtifactError, MissingArtifact, StaleArtifact, disk_full_explained
from raydistill.evaluation.appearance import Sign
from raydistill.evaluation.build import build_report
from raydistill.evaluation.candidates import Lineup, build_lineup, is_teacher
from raydistill.evaluation.ground import Ground
from raydistill.evaluation.measures import Asked
from raydistill.evaluation.real import make_real
from raydistill.evaluation.report import publish_pictures, update_readme
from raydistill.evaluation.run import Setting
from raydistill.models.codec import load_codec
from raydistill.models.folders import codec_digest
from raydistill.models.judge import Judge, load_judge
from raydistill.models.text import WordVectors
from raydistill.student import read_card
from raydistill.world import degrade, sprites

HELD_OUT = tuple(a for a in sprites.ALL if sprites.held_out(a))


def attributes_of(clip: int) -> sprites.Attributes:
    """Held-out attributes of clip number `clip`: neighbours differ, 36 in a row are all of them."""
    return HELD_OUT[7 * clip % len(HELD_OUT)]


def ask(num_clips: int) -> Asked:
    """Captions and what they demand."""
    chosen = [attributes_of(i) for i in range(num_clips)]
    names = ("shape", "colour", "direction", "background", "speed")
    return Asked(
        captions=tuple(a.caption() for a in chosen),
        attributes={name: tuple(getattr(a, name) for a in chosen) for name in names},
        heading=np.array([sprites.DIRECTIONS[a.direction] for a in chosen], dtype=np.float64),
        speed=np.array([sprites.SPEEDS[a.speed] for a in chosen]),
    )


def draw_clips(num_clips: int, seed: int, purpose: str, size: int = sprites.SIZE) -> np.ndarray:
    """Real clips of the held-out captions, uint8 (n, f, h, w, 3); "real" ones as they are measured."""
    first = {"real": 0, "control": 500_000}[purpose] + 1_000_000 * seed
    clips = (sprites.render(sprites.draw_scene(first + i, attributes_of(i)), size) for i in range(num_clips))
    return np.stack([sprites.shrink(clip) if purpose == "real" else clip for clip in clips])


def _judge(config: EvaluateConfig) -> tuple[Judge | None, str]:
    try:
        return load_judge(config.judge), tree_digest(config.judge)
    except MissingArtifact:
        if config.strict:
            raise
        return None, "absent"


def make_setting(config: EvaluateConfig) -> Setting:
    """Captions, real clips, codec and judge of the small world."""
    asked = ask(config.num_clips)
    judge, digest = _judge(config)
    setting = Setting(
        asked=asked,
        text=WordVectors()(asked.captions),
        seed=config.seed,
        real=draw_clips(config.reference_clips, config.seed, "real", config.size),
        control=draw_clips(config.num_clips, config.seed, "control", config.size),
        codec=load_codec(config.codec),
        judge=judge,
        batch_size=config.batch_size,
        sign=Sign(degrade.GLYPH, *degrade.watermark_box(sprites.SIZE, sprites.SIZE), degrade.OPACITY),
        identity={
            "codec": codec_digest(config.codec),
            "judge": digest,
            "world": tree_digest(sprites.__file__),
            "sign": tree_digest(degrade.__file__),
            "reference_clips": config.reference_clips,
            "size": config.size,
        },
        measured=sprites.shrink,
    )
    require_size(config, setting.latent_shape)
    return setting


def require_size(config: EvaluateConfig, latent_shape: tuple[int, ...]) -> None:
    """Refuse students of clips of another size: a network would take any, and give figures of nothing."""
    for folder in chain.from_iterable(config.students.values()):
        try:
            card, _ = read_card(Path(folder))
        except MissingArtifact:
            continue  # skipped later, with its reason
        card.require_word_vectors()
        if tuple(card.latent_shape) != latent_shape:
            raise StaleArtifact(
                f"{folder} makes latents {tuple(card.latent_shape)}, clips of size={config.size} have "
                f"{latent_shape}: set size to that of its clips"
            )


def main() -> None:
    """Run; see the module's docstring."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config, switches = from_command_line(EvaluateConfig, sys.argv[1:], switches=SWITCHES)
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    setting, lineup = ground(config)
    for one in lineup.skipped:
        print(f"skipped {one.what}: {one.reason}", file=sys.stderr)
    if any(config.students.values()) and all(is_teacher(one.group) for one in lineup.candidates):
        raise MissingArtifact(
            "none of the students is there: train one, or name it in students.KIND=[FOLDER]"
        )
    with tqdm(total=len(lineup.candidates) * config.num_clips, unit="clip", mininterval=1.0) as bar:
        last: dict[str, int] = {}

        def progress(title: str, done: int, _total: int) -> None:
            bar.set_description(title, refresh=False)
            bar.update(done - last.get(title, 0))
            last[title] = done

        with disk_full_explained(output, ArtifactError):
            report = build_report(config, setting, lineup, progress)
            dump(config, output / "config.yaml")
    print((output / "report" / "table.md").read_text(encoding="utf-8"))
    for one in report.results["skipped"]:
        print(f"skipped {one['what']}: {one['reason']}")
    print(f"\nreport: {output / 'report.html'}")
    if "update-readme" in switches:
        section = config.readme_section
        docs = Path("docs") if section == "table" else Path("docs", section)
        publish_pictures({k: v for k, v in report.pictures.items() if k != "losses"}, docs)
        update_readme("README.md", (output / "report" / "table.md").read_text(encoding="utf-8"), section)
        print("README.md and docs/ hold this table and its pictures")


def ground(config: EvaluateConfig) -> tuple[Ground, Lineup]:
    """What is measured, and on what: a real teacher and its students on data, or those of the small world."""
    if config.data:
        return make_real(config)
    return make_setting(config), build_lineup(config, WordVectors()([""])[0])


if __name__ == "__main__":
    run(main)
