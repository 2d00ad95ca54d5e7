"""Answers that wait: a job's events as they happen, and the synchronous request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from raydistill.errors import RequestRefused
from raydistill.service.resource import percent, resource
from raydistill.service.store import JobStore, Mine
from raydistill.service.tables import Job

LOOK_EVERY_S = 0.05
SLOWEST_LOOK_S = 0.5
PING_S = 15


class Slots:
    """Counts answers that wait, within this process."""

    def __init__(self, most: int):
        """So many at once."""
        self.most, self.taken = most, 0

    @contextmanager
    def one(self) -> Generator[None, None, None]:
        """Hold a slot. Raises RequestRefused (429) when all are taken."""
        self.take()
        try:
            yield
        finally:
            self.taken -= 1

    def take(self) -> None:
        """Take a slot, to be given back by counting down. Raises RequestRefused (429)."""
        if self.taken >= self.most:
            message = "too many open streams here: poll instead, or try again"
            raise RequestRefused(429, "too_many_requests", message, retry_after_s=1.0)
        self.taken += 1


async def events(
    store: JobStore, job: str, mine: Mine, after: int, slots: Slots, show: Callable[[Job], dict[str, Any]]
) -> Response:
    """Stream a job's events after number `after`, from the store, until the job has ended; 204 if it had.

    Raises RequestRefused: 404, and 429 when all slots are taken.
    """
    if await run_in_threadpool(_is_over, store, job, mine, after):
        return Response(status_code=204)  # else a browser would connect again for ever
    slots.take()

    async def told() -> AsyncIterator[ServerSentEvent]:
        last, wait = after, LOOK_EVERY_S
        try:
            while True:
                new = await run_in_threadpool(store.events, job, last)
                for last, kind, data in new:
                    full = await run_in_threadpool(_full, store, job, mine, kind, data, show)
                    yield ServerSentEvent(json.dumps(full), event=kind, id=str(last))
                    if kind in ("video.completed", "video.failed"):
                        return
                if not new and await run_in_threadpool(_is_over, store, job, mine, last):
                    return
                wait = LOOK_EVERY_S if new else min(SLOWEST_LOOK_S, wait * 1.2)
                await asyncio.sleep(wait)
        except RequestRefused:  # deleted while it was watched
            return
        finally:
            slots.taken -= 1

    return EventSourceResponse(told(), ping=PING_S, headers={"cache-control": "no-store"})


def _is_over(store: JobStore, job: str, mine: Mine, last: int) -> bool:
    """Whether nothing follows: the client has seen the last event before."""
    return store.get(job, mine).ended and not store.events(job, last)


def _full(
    store: JobStore,
    job: str,
    mine: Mine,
    kind: str,
    data: Mapping[str, Any],
    show: Callable[[Job], dict[str, Any]],
) -> dict[str, Any]:
    """Add what is not stored with each event."""
    if kind == "video.queued":
        return {"position": store.ahead(store.get(job, mine))[0]}
    if kind == "video.in_progress":
        return {**data, "progress": percent(data["stage"], data["step"], data["num_steps"])}
    if kind in ("video.completed", "video.failed"):
        return {"video": show(store.get(job, mine))}
    return dict(data)


async def ended(store: JobStore, job: Job, mine: Mine, timeout_s: float, request: Request | None) -> Job:
    """Wait until the job has ended. request: the one that made it; if its client goes away, it is cancelled.

    Raises RequestRefused (504) when that takes too long: the job goes on.
    """
    try:
        return await _ended(store, job, mine, timeout_s, request)
    except asyncio.CancelledError:  # Serve's way to say that the client has gone
        if request is not None:
            with suppress(RequestRefused):  # it had ended
                await asyncio.shield(run_in_threadpool(store.cancel, job.id, mine))
        raise


async def _ended(store: JobStore, job: Job, mine: Mine, timeout_s: float, request: Request | None) -> Job:
    deadline, wait = time.monotonic() + timeout_s, LOOK_EVERY_S / 2
    while not job.ended:
        if request is not None and await request.is_disconnected():
            with suppress(RequestRefused):
                await run_in_threadpool(store.cancel, job.id, mine)
            raise RequestRefused(499, "client_closed_request", "the client went away")
        if time.monotonic() > deadline:
            message = f"not ready after {timeout_s:g} s; it goes on: GET /v1/videos/{job.id}"
            raise RequestRefused(504, "timeout", message)
        await asyncio.sleep(wait)
        wait = min(SLOWEST_LOOK_S, wait * 1.1)
        job = await run_in_threadpool(store.get, job.id, mine)
    return job


def timing_headers(job: Job) -> dict[str, str]:
    """What vLLM-Omni's synchronous answer says of itself."""
    shown = resource(job)["x_raydistill"]
    stages = {name: shown["timings"].get(f"{name}_s") for name in ("queue", "encode", "denoise", "decode")}
    worked = sum(stages[name] or 0.0 for name in ("encode", "denoise", "decode"))
    return {
        "x-model": job.model,
        "x-inference-time-s": f"{worked:.6f}",
        "x-stage-durations": json.dumps(stages),
        "x-raydistill-video-id": job.id,
        "x-raydistill-seed": str(shown["seed"]),
    }
