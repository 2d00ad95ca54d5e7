"""Runs the phases of a load test: cold start, closed loops, a comparison, open loops.

An open loop sends at times that were drawn beforehand, whatever the server does, as users do who do not know
of each other. A closed loop sends when an earlier request has ended, so a slow server is asked less: good for
capacity, blind to queues.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.errors import RequestRefused, ServiceError
from raydistill.service.load.client import READ_ERRORS, VideoApi, open_api
from raydistill.service.load.figures import throughput
from raydistill.service.load.follow import Follower
from raydistill.service.load.kill import kill_in_turn, killable
from raydistill.service.load.plan import Draws, Phase, Request, closed_phases, open_phases
from raydistill.service.load.rows import Record, Row, Run

Show = Callable[[Record], None]
"""Told of the current phase now and then, and when it ends."""
LOOK_EVERY_S = 0.5
CLEANERS = 16
"""Calls at a time when a phase's remains are asked for."""


@dataclass(frozen=True)
class Bench:
    """What every phase needs."""

    config: BenchServeConfig
    api: VideoApi
    run: Run
    show: Show
    began: float
    """By the loop's clock."""


async def measure(config: BenchServeConfig, run: Run, show: Show = lambda record: None) -> None:
    """Run all phases, filling `run`; stops by itself, each phase after `config.timeout_s` at the latest.

    `show` is called with the record of the phase that runs. Raises MissingValue for an API key that is not
    there, MissingArtifact for a file of prompts, ServiceError if the server does not answer or wants a key,
    has no capacity, or no process that may be killed though kills are asked for.
    """
    draws = Draws(config)
    run.started_at = time.time()
    async with open_api(config) as api:
        bench = Bench(config, api, run, show, asyncio.get_running_loop().time())
        run.models = await _ready(bench)
        if config.cold_start:
            await cold_start(bench, draws)
        if warm := draws.of_each_kind(config.warmup):
            await run_phase(bench, Phase(name="warm-up", mode="warmup", requests=warm))
        if config.kills:
            await killable(api, config)
        for phase in closed_phases(config, draws):
            await run_phase(bench, phase)
        run.capacity_per_s = _capacity(run)
        if config.utilisations and not run.capacity_per_s:
            raise ServiceError("no closed loop completed anything, so there is no capacity to take parts of")
        if config.compare:
            turns = Phase(name="compare", mode="compare", requests=draws.in_turn(config.requests))
            await run_phase(bench, turns)
        # Last: an overloaded server is left with a queue.
        for phase in open_phases(config, draws, run.capacity_per_s or 0.0):
            await run_phase(bench, phase)
    run.finished = True


async def _ready(bench: Bench) -> list[dict[str, object]]:
    """Return the server's models once it answers."""
    ends = bench.began + bench.config.ready_s
    while True:
        try:
            return await bench.api.listed("/v1/models")
        except ServiceError as failed:
            if isinstance(failed, RequestRefused) and failed.status in (401, 403, 404):
                raise  # without a key, or at another kind of server, waiting does not help
            if asyncio.get_running_loop().time() >= ends:
                raise ServiceError(
                    f"no server that answers ({failed}): start it, or set base_url, api_key_env or ready_s"
                ) from failed
        await asyncio.sleep(LOOK_EVERY_S)


def _capacity(run: Run) -> float | None:
    """Return the highest throughput of the closed loops; None without any, or if nothing completed."""
    found = [throughput(record) for record in run.records if record.phase.mode == "closed"]
    return max(found, default=0.0) or None


async def cold_start(bench: Bench, draws: Draws) -> None:
    """Wait until no sampler runs, send one request, and note when its video was there.

    Raises ServiceError if the server does not say how many samplers it has.
    """
    loop, config = asyncio.get_running_loop(), bench.config
    began = loop.time()
    while count := await _replicas(bench.api):
        if loop.time() - began > config.cold_wait_s:
            bench.run.cold_start = {"waited_s": loop.time() - began, "replicas": count, "latency_s": None}
            return
        await asyncio.sleep(LOOK_EVERY_S)
    waited = loop.time() - began
    record = await run_phase(bench, Phase(name="cold start", mode="cold", requests=draws.mixed(1)))
    row = record.rows[0]
    bench.run.cold_start = {
        "waited_s": waited,
        "replicas": 0,
        "latency_s": row.latency_s,
        "preview_after_s": row.preview_after_s,
        "queue_s": row.queue_s,
        "outcome": row.outcome,
        "stages": row.stages(),
    }


async def _replicas(api: VideoApi) -> float:
    try:
        count = await api.replicas()
    except READ_ERRORS as failed:
        why = str(failed) or type(failed).__name__
        raise ServiceError(
            f"cold_start reads GET /metrics, which may want a key of an admin: {why}"
        ) from failed
    if count is None:
        raise ServiceError(
            "cold_start: GET /metrics has no gauge raydistill_replicas to tell when it is cold"
        )
    return count


async def run_phase(bench: Bench, phase: Phase) -> Record:
    """Send a phase's requests, follow them, and end them all by the time limit."""
    loop, config = asyncio.get_running_loop(), bench.config
    began = loop.time()
    record = Record.of(phase, began - bench.began)
    bench.run.records.append(record)  # before anything is sent: an interrupted phase counts too

    def clock() -> float:
        return loop.time() - began

    follower = Follower(bench.api, config, clock)
    beside = [asyncio.create_task(_keep_showing(bench, record))]
    if phase.mode in _killed_modes(config):
        beside.append(asyncio.create_task(kill_in_turn(bench.api, config, phase.name, clock, record.kills)))
    try:
        async with asyncio.timeout(config.timeout_s):
            await (_open_loop if phase.mode == "open" else _closed_loop)(follower, record)
    except TimeoutError:
        record.timed_out = True
    finally:
        record.give_up(clock())
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    await settle(follower, record.rows)
    bench.show(record)
    return record


def _killed_modes(config: BenchServeConfig) -> tuple[str, ...]:
    """Kills spoil the measuring of a capacity, so open loops get them where there are any."""
    if not config.kills:
        return ()
    return ("open",) if config.open_loops else ("closed",)


async def _keep_showing(bench: Bench, record: Record) -> None:
    """Show progress until cancelled."""
    while True:
        bench.show(record)
        await asyncio.sleep(LOOK_EVERY_S)


async def _open_loop(follower: Follower, record: Record) -> None:
    """Send each request at its time, without waiting for any other."""
    async with asyncio.TaskGroup() as group:
        for request, row in zip(record.phase.requests, record.rows, strict=True):
            if (early := (request.at_s or 0.0) - follower.clock()) > 0:
                await asyncio.sleep(early)
            group.create_task(follower.drive(request, row))


async def _closed_loop(follower: Follower, record: Record) -> None:
    """Keep so many requests open as the phase is wide."""
    waiting = iter(zip(record.phase.requests, record.rows, strict=True))
    async with asyncio.TaskGroup() as group:
        for _ in range(min(record.phase.concurrency, len(record.rows))):
            group.create_task(_slot(follower, waiting))


async def _slot(follower: Follower, waiting: Iterator[tuple[Request, Row]]) -> None:
    for request, row in waiting:
        await follower.drive(request, row)


async def settle(follower: Follower, rows: list[Row]) -> None:
    """Ask once for every request whose end is not known, and cancel those that have not ended.

    One that ended without its client being told counts as what the server says, but has no latency. Takes
    `call_timeout_s` at most.
    """
    gate = asyncio.Semaphore(CLEANERS)

    async def ask(row: Row) -> None:
        async with gate:
            await follower.look(row)
            row.done_s = row.ended_s = None  # nobody saw when
            if row.outcome == "unfinished" and follower.config.cancel_unfinished:
                with suppress(*READ_ERRORS):
                    await follower.api.call("POST", f"/v1/videos/{row.id}/cancel")

    left = [row for row in rows if row.outcome == "unfinished"]
    with suppress(TimeoutError):
        async with asyncio.timeout(follower.config.call_timeout_s), asyncio.TaskGroup() as group:
            for row in left:
                group.create_task(ask(row))
