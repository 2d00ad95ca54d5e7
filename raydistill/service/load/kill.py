"""Kills sampler processes of this machine while a load runs, to see what becomes of their jobs.

Which ones there are is asked of the server, so everything is refused that could hit something else: a server
that is not reached through a loopback address, a worker of another machine, a process that is gone, one that
has the worker's number but began after the worker was last heard of, and this program itself.
"""

import asyncio
import os
import platform
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config.bench_serve import BenchServeConfig, is_loopback
from raydistill.errors import InvalidValue, ServiceError
from raydistill.service.load.client import VideoApi
from raydistill.service.load.plan import generator
from raydistill.service.load.rows import Kill, Row

WORKERS = "/v1/admin/workers"
PROC = Path("/proc")
CLOCK_SLACK_S = 2.0
"""Start times are known to a tick, and the time of booting to a second."""


def process_began_at(pid: int) -> float | None:
    """Return when a process began, in seconds since 1970; None if it does not run or cannot be asked."""
    try:
        # The name, in brackets, may hold anything; what follows the last bracket is numbers.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        booted = next(
            int(line.split()[1])
            for line in (PROC / "stat").read_text().splitlines()
            if line.startswith("btime")
        )
    except (OSError, StopIteration, IndexError, ValueError):
        return None
    if fields[0] in "ZX":  # ended already, and not yet collected by its parent
        return None
    return booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def why_spared(worker: Mapping[str, Any], stage: str) -> str:
    """Return why a worker's process must not be killed, '' if it may.

    `worker` is {"worker_id", "pid", "node", "seen_at", "stages"} as GET /v1/admin/workers lists it; `seen_at`
    in seconds since 1970.
    """
    pid, seen = worker.get("pid"), worker.get("seen_at")
    if stage not in (worker.get("stages") or ()):
        return f"does not run {stage}"
    if worker.get("node") != platform.node():
        return f"is on {worker.get('node')}, and this is {platform.node()}"
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 1 or pid in (os.getpid(), os.getppid()):
        return f"has no process number that may be killed: {pid!r}"
    if (began := process_began_at(pid)) is None:
        return f"process {pid} does not run"
    if not isinstance(seen, int | float) or began > seen + CLOCK_SLACK_S:
        return f"process {pid} began after the worker was last seen"
    return ""


async def killable(api: VideoApi, config: BenchServeConfig) -> list[dict[str, Any]]:
    """Return the workers that may be killed, in order of their ids.

    Raises InvalidValue unless the server is reached through a loopback address; ServiceError, which says why
    each worker was spared, if there is none.
    """
    if not is_loopback(config.base_url):  # the settings say so too; this is the last look before a kill
        raise InvalidValue("base_url", config.base_url, "a loopback address: kills are for this machine")
    workers = sorted(await api.listed(WORKERS), key=lambda worker: str(worker.get("worker_id")))
    spared = {str(worker.get("worker_id")): why_spared(worker, config.kill_stage) for worker in workers}
    if not (live := [worker for worker in workers if not spared[str(worker.get("worker_id"))]]):
        reasons = "; ".join(f"{name} {why}" for name, why in spared.items()) or "it lists no worker"
        raise ServiceError(f"no sampler process to kill: {reasons}")
    return live


async def kill_one(api: VideoApi, config: BenchServeConfig, chance: np.random.Generator) -> Kill:
    """Kill one sampler process by SIGKILL; `at_s` is for the caller to fill."""
    try:
        live = await killable(api, config)
    except ServiceError as none:  # all dead at the moment: the next turn may find one
        return Kill(at_s=0.0, why_not=str(none))
    worker = live[int(chance.integers(len(live)))]
    try:
        os.kill(worker["pid"], signal.SIGKILL)
    except (ProcessLookupError, PermissionError) as failed:
        return Kill(at_s=0.0, worker_id=str(worker.get("worker_id")), why_not=str(failed))
    return Kill(at_s=0.0, worker_id=str(worker.get("worker_id")), pid=worker["pid"])


async def kill_in_turn(
    api: VideoApi, config: BenchServeConfig, name: str, clock: Callable[[], float], kills: list[Kill]
) -> None:
    """Kill `config.kills` processes, one every `config.kill_every_s`, and note each in `kills`."""
    chance = generator(config.seed, f"kills/{name}")
    for number in range(1, config.kills + 1):
        # By the clock and not by naps, which would add up the time that the calls take.
        await asyncio.sleep(max(0.0, number * config.kill_every_s - clock()))
        one = await kill_one(api, config, chance)
        one.at_s = clock()
        kills.append(one)


def after_kills(kills: Sequence[Kill], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what followed each kill.

    `next_completion_s`: seconds until the next request completed, whichever it was; None if none did.
    `under_way`: accepted requests that had not ended, of which `restarted` needed another attempt and
    `all_done_s` later the last one had completed; None if not all did.
    """
    return [
        {
            "at_s": one.at_s,
            "worker_id": one.worker_id,
            "pid": one.pid,
            "why_not": one.why_not,
            **_recovery(one.at_s, rows),
        }
        for one in kills
    ]


def _recovery(at_s: float, rows: Sequence[Row]) -> dict[str, Any]:
    later = [row for row in rows if row.done_s is None or row.done_s > at_s]
    caught = [row for row in later if row.accepted_s is not None and row.accepted_s <= at_s]
    completed = {row.number: row.done_s - at_s for row in later if row.outcome == "completed" and row.done_s}
    waits = [completed.get(row.number) for row in caught]
    return {
        "next_completion_s": min(completed.values(), default=None),
        "under_way": len(caught),
        "restarted": sum((row.attempt or 1) > 1 for row in caught),
        "all_done_s": max((wait for wait in waits if wait is not None), default=None)
        if None not in waits
        else None,
    }
