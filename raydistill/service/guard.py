"""An ASGI layer that takes a request in whole, under limits of size and time, before anything else sees it.

Installed in Serve's proxy (`in_proxy`), it keeps a slow or huge body from holding a replica's slot; the
application has it too, for servers without that proxy.
"""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydistill.config.serve import LimitsConfig

ENVIRONMENT = "RAYDISTILL_GUARD"
"""JSON of body_kib, body_timeout_s, open_bodies for the proxy, which sees no application's settings."""


class TooLargeError(Exception):
    """The body exceeds the limit."""


class Guard:
    """Reads each body, then hands it on as one message."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig):
        """Wrap an application."""
        self.app, self.limits = app, limits
        self.largest = limits.body_kib * 1024
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, 408 or 429 for what breaks a limit, else let the application answer."""
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        chunked = b"transfer-encoding" in headers
        if scope["type"] != "http" or (length == b"0" and not chunked):
            await self.app(scope, receive, send)
            return
        if not re.fullmatch(rb"[0-9]{1,18}", length) or int(length) > self.largest:
            message = f"the body is larger than {self.limits.body_kib} KiB"
            await answer(send, 413, "request_too_large", message)
        elif self._open >= self.limits.open_bodies:
            message = "too many requests are being read: try again"
            await answer(send, 429, "too_many_requests", message, {"retry-after": "1"})
        else:
            self._open += 1
            try:
                body = await self._read(receive, send)
            finally:
                self._open -= 1
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Receive, send: Send) -> bytes | None:
        """Return the whole body; None if it broke a limit, which is answered, or the client went away."""
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.largest:
                        raise TooLargeError
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.body_timeout_s:g} s"
            await answer(send, 408, "request_timeout", message)
        except TooLargeError:
            message = f"the body is larger than {self.limits.body_kib} KiB"
            await answer(send, 413, "request_too_large", message)
        return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the server says: that the client has gone."""
    pending = [body]

    async def next_message() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return next_message


async def answer(
    send: Send, status: int, code: str, message: str, more: Mapping[str, str] | None = None
) -> None:
    """Send an error in the envelope of all, and close the connection: its body may be still to come."""
    envelope = error_envelope(status, code, message)
    body = json.dumps(envelope).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-should-retry": "true" if more else "false",
        **(more or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Every error's body."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def in_proxy() -> list[Middleware]:
    """Layers for Serve's proxy; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH has to name this function."""
    values = json.loads(os.environ.get(ENVIRONMENT, "{}"))
    return [Middleware(Guard, limits=LimitsConfig(**values))]
