"""Train one network of the small world: codec, judge or teacher.

python jobs/pretrain.py part=teacher output=runs/weights num_steps=12000
"""

import sys

from raydistill.config.load import dump, from_command_line, load, read_early, run
from raydistill.config.pretrain import PretrainConfig

if __name__ == "__main__":
    read_early(PretrainConfig)

from dataclasses import replace
from pathlib import Path

from raydistill.errors import ArtifactError, StaleArtifact, disk_full_explained
from raydistill.world.pretrain import device_of, pretrain


def _result_of(config: PretrainConfig) -> PretrainConfig:
    """What shapes the weights: not how the process runs."""
    return replace(config, device="cpu", threads=1, save_every=1)


def main() -> None:
    """Train, with a line per snapshot."""
    config, _ = from_command_line(PretrainConfig, sys.argv[1:], switches={})
    device_of(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = output / f"{config.part}.yaml"
    if settings.exists() and _result_of(load(PretrainConfig, settings)) != _result_of(config):
        raise StaleArtifact(
            f"{settings} has other settings than asked for: take another output, or delete it"
        )
    with disk_full_explained(output, ArtifactError):
        dump(config, settings)
        pretrain(config, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    run(main)
