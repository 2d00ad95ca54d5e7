"""The server's HTTP interface as a load generator needs it. Nothing here tries a call again.

A class of its own and no SDK: an SDK repeats what fails, and a load generator that does so hides what it is
there to find.
"""

import asyncio
import json
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.errors import MissingValue, RequestRefused, ServiceError

READ_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ServiceError)
"""What a call raises when no answer came, or one that cannot be read."""
LARGEST_EVENT = 64 * 2**20
"""Bytes; a preview frame is far smaller."""


@dataclass(frozen=True)
class Answer:
    """Status, headers and bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the JSON object that the body is. Raises ServiceError."""
        try:
            read = json.loads(self.body)
        except ValueError as broken:
            raise ServiceError(f"not JSON: {self.body[:80]!r}") from broken
        if not isinstance(read, dict):
            raise ServiceError(f"not a JSON object: {self.body[:80]!r}")
        return read

    @property
    def code(self) -> str:
        """The error's code, such as queue_full, or http_503 where the body has none."""
        try:
            return str(self.json()["error"]["code"] or f"http_{self.status}")
        except (ServiceError, KeyError, TypeError):
            return f"http_{self.status}"

    @property
    def is_mp4(self) -> bool:
        """Whether the body begins as an mp4 file does: with an ftyp box."""
        return self.body[4:8] == b"ftyp"


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    id: str = ""


class EventParser:
    """Makes events of the bytes of a text/event-stream, however they are cut."""

    def __init__(self):
        self._rest = b""
        self._fields: dict[str, list[str]] = {}

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that this chunk completes. Raises ServiceError for data that is no JSON."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > LARGEST_EVENT:
            raise ServiceError(f"an event of more than {LARGEST_EVENT} bytes")
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r"))) is not None]

    def _line(self, line: bytes) -> Event | None:
        if line:
            name, _, value = line.decode(errors="replace").partition(":")
            self._fields.setdefault(name, []).append(value.removeprefix(" "))
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        data = Answer(200, {}, "\n".join(fields["data"]).encode()).json()
        name = fields.get("event", [""])[-1] or str(data.get("type", ""))
        return Event(name, data, fields.get("id", [""])[-1])


class VideoApi:
    """Calls on one server."""

    def __init__(self, http: aiohttp.ClientSession, config: BenchServeConfig, key: str = ""):
        self.http, self.config = http, config
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, patient: bool = False
    ) -> Answer:
        """Send one call and read all of its answer; a patient one may take as long as its phase.

        Raises READ_ERRORS.
        """
        timeout = aiohttp.ClientTimeout(total=None if patient else self.config.call_timeout_s)
        async with self.http.request(
            method,
            self.config.base_url + path,
            json=body,
            headers=self._headers,
            timeout=timeout,
            # Content may be behind a signed URL of the storage; aiohttp keeps the key from another host.
            allow_redirects=path.endswith("/content"),
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def events(self, video: str, last: str = "") -> AsyncGenerator[Event, None]:
        """Yield the events of a video after the one whose id is `last`, until the server ends the stream.

        Raises READ_ERRORS, also if the answer is no stream.
        """
        headers = {
            **self._headers,
            "Accept": "text/event-stream",
            **({"Last-Event-ID": last} if last else {}),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.config.call_timeout_s)
        url = f"{self.config.base_url}/v1/videos/{video}/events"
        async with self.http.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                raise ServiceError(f"events: {response.status}")
            parser = EventParser()
            async for chunk in response.content.iter_any():
                for event in parser.feed(chunk):
                    yield event

    async def listed(self, path: str) -> list[dict[str, Any]]:
        """Return `data` of a listing. Raises RequestRefused, ServiceError if it is not to be had."""
        where = f"GET {self.config.base_url}{path}"
        try:
            answer = await self.call("GET", path)
            if answer.status != 200:
                raise RequestRefused(answer.status, answer.code, where)
            listed = answer.json().get("data", [])
        except RequestRefused:
            raise
        except READ_ERRORS as failed:
            raise ServiceError(f"{where}: {str(failed) or type(failed).__name__}") from failed
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    async def replicas(self) -> float | None:
        """Return the number of sampler replicas by the gauge in GET /metrics; None if it is not there.

        Raises RequestRefused, and READ_ERRORS.
        """
        answer = await self.call("GET", "/metrics")
        if answer.status != 200:
            raise RequestRefused(answer.status, answer.code, f"GET {self.config.base_url}/metrics")
        return replicas_in(answer.body.decode(errors="replace"))


def replicas_in(metrics: str) -> float | None:
    """Add up the gauge raydistill_replicas in Prometheus's text format.

    Where any of its series names a sampler in its labels, only such count: whatever else runs, it is cold.
    None if there is no such gauge.
    """
    series = dict[str, float]()
    for line in metrics.splitlines():
        name, _, rest = line.strip().partition("{") if "{" in line else line.strip().partition(" ")
        if name != "raydistill_replicas":
            continue
        labels, _, value = rest.rpartition("}") if "}" in rest else ("", "", rest)
        series[labels] = float(value.split()[0])
    chosen = [value for labels, value in series.items() if "sampler" in labels] or list(series.values())
    total = sum(chosen)
    return total if chosen and math.isfinite(total) else None


def api_key(config: BenchServeConfig) -> str:
    """Return the API key from the environment, '' if none is asked for. Raises MissingValue."""
    if not config.api_key_env:
        return ""
    if not (key := os.environ.get(config.api_key_env, "")):
        raise MissingValue("api_key_env", f"the environment variable {config.api_key_env} is not set")
    return key


@asynccontextmanager
async def open_api(config: BenchServeConfig) -> AsyncIterator[VideoApi]:
    """Open connections to the server during an `async with` block. Raises MissingValue."""
    key = api_key(config)
    # No limit: a request that waits here for a connection would be an open loop that is closed in secret.
    # Servers end idle connections after some 5 s; one that ends just as it is used would look like a failure.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=connector) as http:
        yield VideoApi(http, config, key)
