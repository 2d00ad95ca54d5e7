"""Train one network of the small world: codec, judge or teacher.

python jobs/pretrain.py part=teacher output=runs/weights num_steps=14000
"""

import sys

from raydistill.config.load import from_command_line, run
from raydistill.config.pretrain import PretrainConfig
from raydistill.world.pretrain import pretrain


def main() -> None:
    """Train, with a line per snapshot."""
    config, _ = from_command_line(PretrainConfig, sys.argv[1:], switches={})
    pretrain(config, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run(main)
