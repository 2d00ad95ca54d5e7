"""What all answers have in common: the envelope of errors, the request's id, the origin check."""

import json
import logging
import uuid
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydistill.config.serve import AuthConfig
from raydistill.errors import RequestRefused
from raydistill.service.guard import answer, error_envelope

log = logging.getLogger(__name__)
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
SAFE = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class Json(Response):
    """JSON in ASCII: text that a client sent comes back whatever it holds."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return json.dumps(content, allow_nan=False).encode()


def refusal(error: RequestRefused) -> Response:
    """Answer of a refused request."""
    headers = dict(SAFE)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    elif error.status in (409, 504):
        headers["x-should-retry"] = "false"  # openai's client tries 409 again otherwise
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Json(error_envelope(error.status, error.code, error.message, error.param), error.status, headers)


def install_handlers(app: FastAPI) -> None:
    """Let every error leave in the envelope."""

    @app.exception_handler(RequestRefused)
    async def refused(request: Request, error: RequestRefused) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])[:80]
        return refusal(RequestRefused(400, "invalid_value", f"{name}: {first['msg']}", name))

    @app.exception_handler(HTTPException)
    async def raised(request: Request, error: HTTPException) -> Response:
        code = HTTP_CODES.get(error.status_code, "invalid_request")
        answered = refusal(RequestRefused(error.status_code, code, str(error.detail)))
        answered.headers.update(error.headers or {})  # which methods are allowed
        return answered

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    async def no_store(request: Request, error: Exception) -> Response:
        log.error("the job store did not answer", exc_info=error)
        message = "the job store does not answer: try again"
        return refusal(RequestRefused(503, "service_unavailable", message, retry_after_s=5.0))


class RequestIds:
    """Gives every request an id, for the answer's header and for the log; answers 500 for what nobody caught.

    One that came with an id keeps it, and whoever gave it, as Serve's proxy does, puts it on the answer.
    """

    def __init__(self, app: ASGIApp):
        """Wrap an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the id around the call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        usable = given.isascii() and given.isprintable() and 0 < len(given) <= 128
        ours = given if usable else uuid.uuid4().hex
        token, begun = REQUEST_ID.set(ours), False

        async def with_id(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start" and not usable:
                message = {**message, "headers": [*message["headers"], (b"x-request-id", ours.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, with_id)
        except Exception:
            log.exception("%s %r failed", scope["method"], scope["path"])
            if begun:  # the client learns it by the connection's end
                raise
            message = f"something went wrong here; the log has it as request {ours}"
            await refusal(RequestRefused(500, "internal_error", message))(scope, receive, with_id)
        finally:
            REQUEST_ID.reset(token)


class Origins:
    """Refuses what a page of another site sends, and where no key is required any host name but our own."""

    def __init__(self, app: ASGIApp, auth: AuthConfig):
        """Wrap an application."""
        self.app, self.auth = app, auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or let the application answer."""
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
            if origin and origin.partition("://")[2] != host:
                await answer(send, 403, "cross_origin", "requests from pages of other sites are refused")
                return
            name = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
            if not self.auth.required and name not in self.auth.hosts:
                message = f"this server has no API keys and is not called {name[:80]!r}: see auth.hosts"
                await answer(send, 403, "wrong_host", message)
                return
        await self.app(scope, receive, send)
