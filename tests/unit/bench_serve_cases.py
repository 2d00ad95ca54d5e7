"""A small real video server with known times, for the load generator's tests.

Nothing is computed: a job's start and end follow from its arrival, the jobs before it and the service times
that the test chose, so every latency is known beforehand, up to what sockets and the machine add.
"""

import asyncio
import base64
import heapq
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.service.load.rows import Run
from raydistill.service.load.run import measure

MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(100)
TINY = {
    "warmup": 0,
    "concurrency": (),
    "utilisations": (),
    "num_draws": 50,
    "ready_s": 5.0,
    "timeout_s": 20.0,
}
"""Settings that leave nothing but what a test adds."""


@dataclass
class Script:
    """How the server behaves."""

    service_s: Callable[[dict], float] = lambda fields: 0.02
    servers: int = 1
    most_waiting: int = 10**6
    lost: frozenset[int] = frozenset()
    """Numbers of accepted jobs, from 0, that never end."""
    failed: frozenset[int] = frozenset()
    cancelled: frozenset[int] = frozenset()
    refused: frozenset[int] = frozenset()
    """Numbers of POSTs answered 503."""
    same_id: bool = False
    freeze: dict[int, float] = field(default_factory=dict)
    """Number of a POST -> seconds for which the whole server stands still before it is answered."""
    broken_streams: int = 0
    """So many streams end right after their first event."""
    content: bytes = MP4
    content_status: int = 200
    key: str = ""
    replicas: list[float] = field(default_factory=list)
    """Values of the gauge, one per reading; the last stays."""
    workers: list[dict] = field(default_factory=list)
    poll_ms: str = "20"


@dataclass
class Job:
    number: int
    id: str
    fields: dict
    arrived: float
    start: float
    end: float


class Server:
    """State and handlers; lives in a thread of its own, so that it can stand still without its clients."""

    def __init__(self, script: Script):
        self.script = script
        self.jobs: list[Job] = []
        self.posts = 0
        self.cancels: list[str] = []
        self.last_event_ids: list[str] = []
        self.free = [0.0] * script.servers
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard])
        app.router.add_post("/v1/videos", self.create)
        app.router.add_post("/v1/videos/sync", self.sync)
        app.router.add_get("/v1/videos/{id}", self.get)
        app.router.add_get("/v1/videos/{id}/events", self.events)
        app.router.add_get("/v1/videos/{id}/content", self.content)
        app.router.add_post("/v1/videos/{id}/cancel", self.cancel)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/admin/workers", self.workers)
        app.router.add_get("/metrics", self.metrics)
        return app

    @web.middleware
    async def guard(self, request, handler):
        if self.script.key and request.headers.get("Authorization") != f"Bearer {self.script.key}":
            return error(401, "invalid_api_key")
        return await handler(request)

    async def admit(self, request) -> Job | web.Response:
        number, self.posts = self.posts, self.posts + 1
        if number in self.script.freeze:
            time.sleep(self.script.freeze[number])  # the loop itself: nobody is answered
        if number in self.script.refused:
            return error(503, "overloaded")
        fields, now = await request.json(), time.monotonic()
        if sum(job.start > now for job in self.jobs) >= self.script.most_waiting:
            return error(429, "queue_full")
        start = max(now, heapq.heappop(self.free))
        end = start + self.script.service_s(fields)
        heapq.heappush(self.free, end)
        index = len(self.jobs)
        name = "video_same" if self.script.same_id else f"video_{index}"
        self.jobs.append(Job(index, name, fields, now, start, end))
        return self.jobs[-1]

    def resource(self, job: Job) -> dict:
        now, service = time.monotonic(), job.end - job.start
        status, fault = "queued" if now < job.start else "in_progress", None
        if now >= job.end and job.number not in self.script.lost:
            status = "completed"
            if job.number in self.script.failed | self.script.cancelled:
                code = "cancelled" if job.number in self.script.cancelled else "bad_luck"
                status, fault = "failed", {"code": code, "message": "so the test wants it"}
        timings = {"queue_s": job.start - job.arrived, "encode_s": 0.1 * service, "denoise_s": 0.7 * service}
        timings |= {"decode_s": 0.1 * service, "total_s": job.end - job.arrived, "passes": 4}
        extra = {"attempt": 1, "timings": timings if status == "completed" else None}
        return {"id": job.id, "object": "video", "status": status, "error": fault, "x_raydistill": extra}

    def find(self, request) -> Job:
        return next(job for job in self.jobs if job.id == request.match_info["id"])

    async def create(self, request):
        job = await self.admit(request)
        return job if isinstance(job, web.Response) else web.json_response(self.resource(job))

    async def sync(self, request):
        job = await self.admit(request)
        if isinstance(job, web.Response):
            return job
        await until(job.end)
        stages = {"queue": job.start - job.arrived, "denoise": job.end - job.start}
        headers = {"X-Request-Id": job.id, "X-Stage-Durations": json.dumps(stages)}
        return web.Response(body=self.script.content, headers=headers)

    async def get(self, request):
        headers = {"openai-poll-after-ms": self.script.poll_ms}
        return web.json_response(self.resource(self.find(request)), headers=headers)

    async def events(self, request):
        job = self.find(request)
        self.last_event_ids.append(request.headers.get("Last-Event-ID", ""))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def say(number: int, name: str, data: dict):
            if number > int(request.headers.get("Last-Event-ID") or 0):
                lines = f"id: {number}\r\nevent: {name}\r\ndata: {json.dumps(data)}\r\n\r\n"
                await response.write(b": ping\r\n\r\n" + lines.encode())

        await say(1, "video.queued", {"position": 1})
        if self.script.broken_streams > 0:
            self.script.broken_streams -= 1
            return response
        await until(job.start)
        await say(2, "video.in_progress", {"stage": "denoise", "step": 1, "num_steps": 4, "progress": 25})
        await until((job.start + job.end) / 2)
        frame = base64.b64encode(bytes(150_000)).decode()  # more than a line that readers usually take
        await say(3, "video.partial_frame", {"b64_json": frame, "index": 0, "step": 1, "format": "png"})
        await until(1e12 if job.number in self.script.lost else job.end)
        resource = self.resource(job)
        await say(4, f"video.{resource['status']}", {"video": resource})
        return response

    async def content(self, request):
        return web.Response(body=self.script.content, status=self.script.content_status)

    async def cancel(self, request):
        self.cancels.append(request.match_info["id"])
        return web.json_response({})

    async def models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def workers(self, request):
        return web.json_response({"data": self.script.workers})

    async def metrics(self, request):
        if not self.script.replicas:
            return web.Response(text="up 1\n")
        value = self.script.replicas.pop(0) if len(self.script.replicas) > 1 else self.script.replicas[0]
        text = f'# HELP raydistill_replicas Replicas.\nraydistill_replicas{{role="sampler"}} {value}\n'
        return web.Response(text=text + 'raydistill_replicas{role="ingress"} 1\n')


def error(status: int, code: str) -> web.Response:
    body = {"error": {"message": "no", "type": "server_error", "param": None, "code": code}}
    return web.json_response(body, status=status)


async def until(moment: float) -> None:
    while (left := moment - time.monotonic()) > 0:
        await asyncio.sleep(min(left, 1.0))


@contextmanager
def serving(**script):
    """Run a server on a free port of 127.0.0.1 during a `with` block."""
    server, loop = Server(Script(**script)), asyncio.new_event_loop()
    ready, done = threading.Event(), asyncio.Event()

    async def live():
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)
        loop.close()


def bench(server: Server, show=lambda record: None, **settings) -> tuple[BenchServeConfig, Run]:
    """Run the load generator against a server; the settings come on top of TINY."""
    config = BenchServeConfig(**{**TINY, "base_url": server.url, **settings})
    run = Run()
    asyncio.run(measure(config, run, show))
    return config, run
