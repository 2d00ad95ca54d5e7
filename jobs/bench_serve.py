"""Put load on a running server, and report latencies, goodput, what it sheds and what it loses.

    python jobs/bench_serve.py
    python jobs/bench_serve.py utilisations=[0.5,0.8,1.2] requests=200 deadline_s=5 output=runs/bench
    python jobs/bench_serve.py concurrency=[] rates=[1] utilisations=[] kills=3 kill_every_s=20
    python jobs/bench_serve.py concurrency=[] utilisations=[] compare='[{plan: "4"}, {plan: teacher50}]'

Each request is sent once and never again. Ctrl-C writes what there is, marked as unfinished.
"""

import sys

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.config.load import dump, from_command_line, read_early, run

if __name__ == "__main__":
    read_early(BenchServeConfig)

import asyncio
import resource
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from raydistill.errors import ServiceError, disk_full_explained
from raydistill.service.load.report import progress, rich_table, write_run
from raydistill.service.load.rows import Run
from raydistill.service.load.run import measure


def _allow_open_streams() -> None:
    """Let this process have as many connections as the machine permits: each request holds one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Run; see the module's docstring."""
    config, _ = from_command_line(BenchServeConfig, sys.argv[1:])
    _allow_open_streams()
    output, learned, stopped = Path(config.output), Run(), False
    try:
        with progress() as show:
            asyncio.run(measure(config, learned, show))
    except KeyboardInterrupt:
        stopped = True
    finally:
        # Also of a run that was stopped, or that stopped itself; but nothing of one that never began.
        if learned.records:
            with disk_full_explained(output, ServiceError):
                results = write_run(config, learned)
                dump(config, output / "config.yaml")
            terminal = Console()
            # A file has room for the whole table.
            terminal.print(rich_table(results))
            print(f"{'report' if learned.finished else 'unfinished, report'}: {output / 'report.md'}")
    if stopped:
        raise SystemExit(130)


if __name__ == "__main__":
    run(main)
