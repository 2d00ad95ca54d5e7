"""The HTTP interface: /v1/videos as the open servers speak it, over the job store.

Nothing here computes: a request is checked, written, read. So any replica answers any request.
"""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from raydistill.config.serve import ServeConfig
from raydistill.errors import ArtifactError, RequestRefused
from raydistill.service import streams
from raydistill.service.catalog import Catalog
from raydistill.service.content import content
from raydistill.service.files import Files
from raydistill.service.guard import Guard
from raydistill.service.http import Json, Origins, RequestIds, install_handlers
from raydistill.service.keys import OPEN, ApiKeys, Caller, Failures
from raydistill.service.metrics import exposition
from raydistill.service.requests import parse, read_form, read_json, refuse, resolve
from raydistill.service.resource import resource
from raydistill.service.schema import FORMS, describe
from raydistill.service.store import JobStore
from raydistill.service.tables import Job, open_database

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {path.name for path in PAGE.iterdir()}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "cache-control": "no-cache",  # after an upgrade no old script with a new page
    "x-content-type-options": "nosniff",
}
ID = re.compile(r"video_[0-9a-f]{32}")
POLL_MS = (250, 5000)
POLLS = 3
"""Clients are told to look again after so small a part of what a video is thought to take still."""
A_FILE = ("a file",)
"""Stands for one that was sent in a form: no field of text or numbers takes it."""


@dataclass
class Ingress:
    """What the routes use; the catalog may be exchanged while they run."""

    config: ServeConfig
    catalog: Catalog
    store: JobStore
    files: Files

    @staticmethod
    def open(config: ServeConfig, store: str, catalog: Catalog) -> "Ingress":
        """Open the store (its URL resolved) and the artefacts."""
        jobs = JobStore(open_database(store), config.limits, config.keep)
        return Ingress(config, catalog, jobs, Files(config.artifacts))


def build_api(ingress: Ingress) -> FastAPI:
    """Make the application."""
    app = FastAPI(title="raydistill", docs_url=None, redoc_url=None, redirect_slashes=False)
    install_handlers(app)
    app.add_middleware(Origins, auth=ingress.config.auth)
    app.add_middleware(Guard, limits=ingress.config.limits)
    app.add_middleware(RequestIds)
    routes = Routes(ingress)
    routes.install(app)
    describe(app)
    return app


class Routes:
    """The routes' functions; each says in a line what it answers."""

    def __init__(self, ingress: Ingress):
        """Over one ingress."""
        self.on = ingress
        self.keys = ApiKeys(ingress.store.database)
        self.failures = Failures(ingress.config.auth.failures_per_minute)
        self.slots = streams.Slots(ingress.config.limits.streams)

    def install(self, app: FastAPI) -> None:
        """Give every path its function."""
        videos, one = "/v1/videos", "/v1/videos/{video_id}"
        app.post(videos)(self.create)
        app.post(f"{videos}/sync")(self.sync)
        app.get(videos)(self.list)
        app.get(one)(self.get)
        app.delete(one)(self.delete)
        app.get(f"{one}/content")(self.content)
        app.head(f"{one}/content", include_in_schema=False)(self.content)
        app.get(f"{one}/events")(self.events)
        app.post(f"{one}/cancel")(self.cancel)
        app.post(f"{one}/remix")(self.remix)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model_id}")(self.model)
        app.get("/v1/admin/workers")(self.workers)
        for path, answer in (("/health", self.health), ("/ready", self.ready)):
            app.get(path)(answer)
            app.head(path, include_in_schema=False)(answer)  # probes of load balancers
        app.get("/metrics")(self.metrics)
        app.get("/", include_in_schema=False)(self.index)
        app.head("/", include_in_schema=False)(self.index)
        app.get("/{name}", include_in_schema=False)(self.page)

    def caller(self, request: Request) -> Caller:
        """Who asks. Raises RequestRefused: 401, or 429 after too many wrong keys."""
        if not self.on.config.auth.required:
            return OPEN
        address = request.client.host if request.client else "?"
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        caller = self.keys.find(key.strip()) if kind.lower() == "bearer" else None
        if caller is None:
            if key:  # a valid one is never held up: behind a load balancer many share an address
                self.failures.add(address)
            message = "give a valid API key: Authorization: Bearer KEY"
            raise RequestRefused(401, "invalid_api_key", message)
        return caller

    async def _allowed(self, request: Request, scope: str) -> Caller:
        caller = await run_in_threadpool(self.caller, request)
        caller.require(scope)
        return caller

    async def _values(self, request: Request) -> dict[str, Any]:
        """The body's fields, of JSON or a form."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind not in FORMS:
            if kind not in ("application/json", ""):
                raise RequestRefused(415, "unsupported_media_type", f"send JSON, {' or '.join(FORMS)}")
            return read_json(await request.body())
        try:
            form = await request.form(max_files=1, max_fields=100)
        except (HTTPException, ValueError) as error:
            why = str(getattr(error, "detail", error))[:200]
            raise refuse(f"the form cannot be read: {why}", code="invalid_form") from error
        return read_form((k, A_FILE if isinstance(v, UploadFile) else v) for k, v in form.multi_items())

    async def _create(self, request: Request, base: Job | None = None) -> tuple[Job, Caller, bool]:
        """Returns the job, whose it is, and whether this request made it."""
        caller = await self._allowed(request, "generate")
        values = await self._values(request)
        parsed = parse(values, self.on.config.limits, _inherited(base) if base else {})
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
            raise refuse("an Idempotency-Key has 1 to 255 printable characters", "Idempotency-Key")
        again = request.headers.get("x-stainless-retry-count", "0")
        new = resolve(
            parsed,
            self.on.catalog,
            self.on.config.limits,
            caller.tenant,
            remixed_from=base.id if base else None,
        )
        is_retry = re.fullmatch(r"0*[1-9][0-9]*", again) is not None
        job = await run_in_threadpool(
            self.on.store.create, new, quota=caller.quota, key=key, is_retry=is_retry
        )
        return job, caller, job.id == new.id

    def _shown(self, request: Request, job: Job) -> Response:
        extended = request.headers.get("x-raydistill-extended-status") == "1"
        ahead = None if job.ended else self.on.store.ahead(job)
        headers = {"cache-control": "no-store"}
        if ahead is not None:
            after_ms = math.ceil(ahead[1] * 1000 / POLLS)
            headers["openai-poll-after-ms"] = str(min(max(after_ms, POLL_MS[0]), POLL_MS[1]))
        return Json(resource(job, ahead=ahead, extended=extended), headers=headers)

    async def _find(self, request: Request, video_id: str, scope: str = "generate") -> tuple[Job, Caller]:
        caller = await self._allowed(request, scope)
        return await run_in_threadpool(self.on.store.get, _id(video_id), caller.mine), caller

    async def create(self, request: Request) -> Response:
        """Accept a video into the queue."""
        job, _, _ = await self._create(request)
        return await run_in_threadpool(self._shown, request, job)

    async def remix(self, request: Request, video_id: str) -> Response:
        """Make a new video with another prompt, and whatever else is given, from the same noise."""
        base, _ = await self._find(request, video_id)
        job, _, _ = await self._create(request, base)
        return await run_in_threadpool(self._shown, request, job)

    async def sync(self, request: Request) -> Response:
        """Make a video and answer with its bytes."""
        with self.slots.one():
            job, caller, made = await self._create(request)
            timeout_s = self.on.config.limits.sync_timeout_s
            job = await streams.ended(self.on.store, job, caller.mine, timeout_s, request if made else None)
        if job.state != "completed":
            raise RequestRefused(
                500 if job.state == "failed" else 409, job.error_code or "", job.error_message or ""
            )
        answer = await run_in_threadpool(content, job, "video", request, self.on.files, redirect=False)
        answer.headers.update(streams.timing_headers(job))
        return answer

    async def list(self, request: Request) -> Response:
        """List the caller's videos."""
        caller = await self._allowed(request, "generate")
        query = request.query_params
        limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
        if not re.fullmatch(r"[0-9]{1,2}|100", limit):
            raise refuse("limit is a number from 0 to 100", "limit")
        if order not in ("asc", "desc"):
            raise refuse("order is asc or desc", "order")
        if unknown := sorted(set(query) - {"limit", "order", "after"}):
            raise refuse(
                f"unknown parameter {unknown[0][:80]!r}; known are after, limit, order",
                unknown[0][:80],
                "unknown_parameter",
            )
        after = _id(after, "after") if after else None
        jobs, more = await run_in_threadpool(
            self.on.store.page, caller.mine, int(limit), cast(Any, order), after
        )
        extended = request.headers.get("x-raydistill-extended-status") == "1"
        data = [resource(job, extended=extended) for job in jobs]
        ends = (
            {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
            if data
            else {"first_id": None, "last_id": None}
        )
        return Json({"object": "list", "data": data, **ends, "has_more": more})

    async def get(self, request: Request, video_id: str) -> Response:
        """Show a video."""
        job, _ = await self._find(request, video_id)
        return await run_in_threadpool(self._shown, request, job)

    async def delete(self, request: Request, video_id: str) -> Response:
        """Remove a video; work on it is stopped at the next step."""
        caller = await self._allowed(request, "generate")
        job = await run_in_threadpool(self.on.store.delete, _id(video_id), caller.mine)
        for folder in ("videos", "work"):
            with suppress(ArtifactError):  # a worker is just writing there: the janitor removes what is left
                await run_in_threadpool(self.on.files.remove, f"{folder}/{job.id}")
        return Json({"id": job.id, "object": "video.deleted", "deleted": True})

    async def cancel(self, request: Request, video_id: str) -> Response:
        """Stop work on a video at the next step."""
        caller = await self._allowed(request, "generate")
        job = await run_in_threadpool(self.on.store.cancel, _id(video_id), caller.mine)
        return await run_in_threadpool(self._shown, request, job)

    async def content(self, request: Request, video_id: str, variant: str = "video") -> Response:
        """Answer with the video's bytes, its thumbnail or its spritesheet."""
        job, _ = await self._find(request, video_id)
        # The page reads the bytes here: it may not, and cannot, fetch them from the storage's host.
        redirect = self.on.config.redirect and request.query_params.get("redirect") != "0"
        return await run_in_threadpool(content, job, variant, request, self.on.files, redirect=redirect)

    async def events(self, request: Request, video_id: str) -> Response:
        """Follow a video: server-sent events, replayed after Last-Event-ID."""
        caller = await self._allowed(request, "generate")
        after = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        if not re.fullmatch(r"\d{1,18}", after, re.ASCII):
            raise refuse("Last-Event-ID has to be the number of an event", "Last-Event-ID")
        extended = request.headers.get("x-raydistill-extended-status") == "1"
        return await streams.events(
            self.on.store,
            _id(video_id),
            caller.mine,
            int(after),
            self.slots,
            lambda job: resource(job, extended=extended),
        )

    async def models(self, request: Request) -> Response:
        """List the models, with what may be asked of each."""
        await self._allowed(request, "generate")
        return Json({"object": "list", "data": self.on.catalog.listing()})

    async def model(self, request: Request, model_id: str) -> Response:
        """Show a model."""
        await self._allowed(request, "generate")
        return Json(self.on.catalog.shown(self.on.catalog.model(model_id)))

    async def workers(self, request: Request) -> Response:
        """List the sampler replicas that were heard of."""
        await self._allowed(request, "admin")
        workers = await run_in_threadpool(self.on.store.workers)
        data = [{"worker_id": worker.pop("id"), **worker} for worker in map(dict, workers)]
        return Json({"object": "list", "data": data})

    async def health(self) -> Response:
        """Whether this process answers."""
        return Json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether the store answers; `status`: whether the queue takes more. Samplers start with the work."""
        load = await run_in_threadpool(self.on.store.load)
        replicas = len(await run_in_threadpool(self.on.store.workers))
        full = load.queued + load.running >= self.on.config.limits.queued_jobs
        about = {"status": "queue_full" if full else "ready", "queued": load.queued, "replicas": replicas}
        return Json({**about, "models": list(self.on.catalog.models)})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        await self._allowed(request, "admin")
        text = await run_in_threadpool(exposition, self.on.store)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def index(self) -> Response:
        """The web page."""
        return await self.page("index.html")

    async def page(self, name: str) -> Response:
        """A part of the web page."""
        if name not in PAGE_FILES:
            raise RequestRefused(404, "not_found", "there is nothing at this address")
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)


def _id(video_id: str, param: str = "video_id") -> str:
    """Refuse what cannot be an id before it reaches a database. Raises RequestRefused (404)."""
    if not ID.fullmatch(video_id):
        raise RequestRefused(404, "video_not_found", f"no video {video_id[:80]!r}", param)
    return video_id


def _inherited(base: Job) -> dict[str, Any]:
    """What a remix takes over: the same noise, steps and size, unless it says otherwise."""
    kept = {name: base.request[name] for name in ("plan", "seed", "width", "height")}
    return {"model": base.model, **kept, "num_frames": base.request["frames"]}
