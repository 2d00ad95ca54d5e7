"""Train one network of the small world: codec, judge or teacher.

python jobs/pretrain.py part=teacher output=runs/weights num_steps=12000
"""

import sys
from pathlib import Path

from raydistill.config.load import dump, from_command_line, run
from raydistill.config.pretrain import PretrainConfig
from raydistill.errors import ArtifactError, disk_full_explained
from raydistill.world.pretrain import pretrain


def main() -> None:
    """Train, with a line per snapshot."""
    config, _ = from_command_line(PretrainConfig, sys.argv[1:], switches={})
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with disk_full_explained(output, ArtifactError):
        dump(config, output / f"{config.part}.yaml")
        pretrain(config, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run(main)
