"""Write the student that a checkpoint of jobs/distill.py holds.

    python jobs/consolidate.py checkpoint=RUN/checkpoints/detail-step-000200 output=FOLDER

On one machine, without Ray and without a GPU. The run may go on meanwhile; it may have any number of workers.
"""

import sys

from raydistill.config.consolidate import ConsolidateConfig
from raydistill.config.load import from_command_line, read_early, run

if __name__ == "__main__":
    read_early(ConsolidateConfig)

from dataclasses import replace
from pathlib import Path

from raydistill.artifacts import LatentStore
from raydistill.config.distill import DistillConfig
from raydistill.config.load import load
from raydistill.errors import DistillError, InvalidValue, MissingArtifact, disk_full_explained
from raydistill.experts.checkpoint import verify
from raydistill.experts.result import consolidate
from raydistill.experts.worker import SETTINGS
from raydistill.trajectories.inputs import named


def main() -> None:
    """Consolidate, and say what was."""
    asked, _ = from_command_line(ConsolidateConfig, sys.argv[1:])
    folder, output = Path(asked.checkpoint).resolve(), Path(asked.output)
    verify(folder, contents=False)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidValue("output", asked.output, "a new or an empty folder")
    settings = Path(asked.settings or folder.parents[1] / SETTINGS)
    if not settings.is_file():
        raise MissingArtifact(f"no settings of the run at {settings}: name them with settings=")
    config = load(DistillConfig, settings)
    moved = {name: getattr(asked, name) for name in ("teacher", "data") if getattr(asked, name)}
    config = replace(config, **moved)
    with named("data", "made; or say with data= where they lie"):
        store = LatentStore(config.data)
    with disk_full_explained(output, DistillError):
        state = consolidate(folder, config, store, output)
    print(f"student: {output}, of step {state.step} of the {state.stage} stage")


if __name__ == "__main__":
    run(main)
