"""One request from its sending to its video: by server-sent events, by polls, or in one call that waits."""

import asyncio
import json
import math
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.errors import ServiceError
from raydistill.service.load.client import READ_ERRORS, Answer, Event, VideoApi
from raydistill.service.load.plan import Request
from raydistill.service.load.rows import Outcome, Row

POLL_S = 1.0
"""Where neither the settings nor the server say how often."""
QUICKEST_S, SLOWEST_S = 0.01, 10.0
"""A server's wish about polls is followed within these."""
CANCELLED = ("cancelled", "canceled", "video_cancelled", "job_cancelled")


def outcome_of(resource: dict[str, Any]) -> Outcome | None:
    """Return how a VideoResource says that it ended; None if it has not."""
    status = resource.get("status")
    if status == "failed":
        return "cancelled" if error_code(resource) in CANCELLED else "failed"
    if status == "completed" or status == "cancelled":
        return status
    return None


def error_code(resource: dict[str, Any]) -> str:
    """Return the error's code of a VideoResource, '' if it has none."""
    error = resource.get("error")
    return str(error.get("code") or "") if isinstance(error, dict) else ""


def seconds_by_stage(timings: Any) -> dict[str, float]:
    """Return {'queue_s': ..., ...}: what is a number, its name ending in _s."""
    if not isinstance(timings, dict):
        return {}
    numbers = {str(k): float(v) for k, v in timings.items() if isinstance(v, int | float) and k != "passes"}
    return {key if key.endswith("_s") else f"{key}_s": value for key, value in numbers.items()}


def take_in(row: Row, resource: dict[str, Any], now_s: float) -> None:
    """Note in a row what a VideoResource says, seen at `now_s`."""
    extra = resource.get("x_raydistill")
    extra = extra if isinstance(extra, dict) else {}
    if isinstance(extra.get("attempt"), int):
        row.attempt = extra["attempt"]
    if row.started_s is None and resource.get("status") not in ("queued", None):
        row.started_s = now_s
    if (outcome := outcome_of(resource)) is None:
        return
    row.outcome, row.code, row.done_s = outcome, error_code(resource), now_s
    row.ended_s = now_s
    row.timings = seconds_by_stage(extra.get("timings"))


@dataclass(frozen=True)
class Follower:
    """Sends requests of one phase and follows each to its end."""

    api: VideoApi
    config: BenchServeConfig
    clock: Callable[[], float]
    """Seconds since the phase began."""

    async def drive(self, request: Request, row: Row) -> None:
        """Send one request, once, and fill its row; whatever the server does is noted, never raised."""
        row.sent_s = self.clock()
        # In a closed loop a request is meant to arrive when its slot is free.
        row.intended_s = row.sent_s if row.intended_s is None else row.intended_s
        row.outcome = "sent"
        try:
            if self.config.follow == "sync":
                await self._wait_for(request, row)
                return
            await self._submit(request, row)
        except READ_ERRORS as failed:
            row.outcome, row.code = "error", transport_code(failed)
            return
        if row.outcome == "unfinished":
            await (self._by_events if self.config.follow == "events" else self._by_polls)(row)
        if row.outcome == "completed" and self.config.content:
            await self._fetch(row)

    async def _submit(self, request: Request, row: Row) -> None:
        answer = await self.api.call("POST", "/v1/videos", request.fields)
        if not 200 <= answer.status < 300:
            return refuse(row, answer)
        resource = answer.json()
        if not isinstance(resource.get("id"), str):
            raise ServiceError("a video without id")
        row.id, row.outcome, row.accepted_s = resource["id"], "unfinished", self.clock()
        take_in(row, resource, row.accepted_s)

    async def _wait_for(self, request: Request, row: Row) -> None:
        """Get the video as the answer itself."""
        answer = await self.api.call("POST", "/v1/videos/sync", request.fields, patient=True)
        now = self.clock()
        if not 200 <= answer.status < 300:
            return refuse(row, answer)
        names = (answer.headers.get(name, "") for name in ("X-Raydistill-Video-Id", "X-Request-Id"))
        row.id = next(filter(None, names), f"request-{row.number}")
        row.outcome, row.accepted_s, row.done_s, row.ended_s = "completed", now, now, now
        try:
            row.timings = seconds_by_stage(json.loads(answer.headers.get("X-Stage-Durations", "{}")))
        except ValueError:
            row.timings = {}
        keep(row, answer)

    async def _by_polls(self, row: Row) -> None:
        """Ask until it has ended; the phase's time limit cancels this."""
        while row.outcome == "unfinished":
            wait = await self.look(row)
            if row.outcome == "unfinished":
                await asyncio.sleep(wait)

    async def _by_events(self, row: Row) -> None:
        """Read events, and connect again where a stream ends before the video does."""
        last = ""
        while row.outcome == "unfinished":
            try:
                async with aclosing(self.api.events(row.id, last)) as events:
                    async for event in events:
                        last = event.id or last
                        if self._note(row, event):
                            return
            except READ_ERRORS:
                row.broken_reads += 1
            # A stream that broke, was refused, or ended with an event that says too little: ask.
            wait = await self.look(row)
            if row.outcome == "unfinished":
                await asyncio.sleep(wait)

    def _note(self, row: Row, event: Event) -> bool:
        """Take in an event; whether it is the last that matters."""
        now = self.clock()
        if event.name == "video.partial_frame" and row.preview_s is None:
            row.preview_s = now
        if event.name in ("video.in_progress", "video.partial_frame") and row.started_s is None:
            row.started_s = now
        if isinstance(video := event.data.get("video"), dict):
            take_in(row, video, now)
        return row.outcome != "unfinished"

    async def look(self, row: Row) -> float:
        """Ask for the state once; return after how many seconds to ask again."""
        wait = self.config.poll_s or POLL_S
        row.polls += 1
        try:
            answer = await self.api.call("GET", f"/v1/videos/{row.id}")
            if answer.status != 200:
                row.broken_reads += 1
                row.last_status = answer.code
                return wait
            resource = answer.json()
        except READ_ERRORS as failed:
            row.broken_reads += 1
            row.last_status = transport_code(failed)
            return wait
        row.last_status = str(resource.get("status"))
        take_in(row, resource, self.clock())
        return self.config.poll_s or asked_wait(answer)

    async def _fetch(self, row: Row) -> None:
        row.content_code = "no_answer"  # until there is one: the phase may end before
        try:
            keep(row, await self.api.call("GET", f"/v1/videos/{row.id}/content"))
        except READ_ERRORS as failed:
            row.content_code = transport_code(failed)
        row.ended_s = self.clock()


def refuse(row: Row, answer: Answer) -> None:
    """Note that the server did not take a request. 429 is what it is meant to say above its capacity."""
    row.outcome, row.code = ("shed" if answer.status == 429 else "error"), answer.code


def keep(row: Row, answer: Answer) -> None:
    """Note how large the video is, or that it is none."""
    row.content_bytes, row.content_code = len(answer.body), ""
    if not 200 <= answer.status < 300:
        row.content_code = answer.code
    elif not answer.is_mp4:
        row.content_code = "not_mp4"


def asked_wait(answer: Answer) -> float:
    """Return the seconds that the server wants between polls."""
    try:
        asked = float(answer.headers.get("openai-poll-after-ms", "")) / 1000
    except ValueError:
        return POLL_S
    return min(max(asked, QUICKEST_S), SLOWEST_S) if math.isfinite(asked) else POLL_S


def transport_code(failed: BaseException) -> str:
    """Name a failure below HTTP's statuses."""
    if isinstance(failed, TimeoutError):
        return "timeout"
    return "unreadable" if isinstance(failed, ServiceError) else "connection"
