"""The interface as OpenAPI: what each path takes, and every status it answers with."""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from raydistill.service.requests import VideoRequest

JSON, MP4, WEBP, STREAM, TEXT = (
    "application/json",
    "video/mp4",
    "image/webp",
    "text/event-stream",
    "text/plain",
)
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
CODES = {
    400: "invalid_value, unknown_parameter, missing_parameter, unsupported_size, prompt_too_long, "
    "cost_too_high, invalid_json, invalid_form",
    401: "invalid_api_key",
    403: "insufficient_scope, cross_origin, wrong_host",
    404: "video_not_found, model_not_found, not_found",
    408: "request_timeout: the body did not come in time",
    409: "video_not_ready, video_failed, video_not_cancellable, idempotency_key_reused, cancelled",
    410: "video_expired",
    413: "request_too_large",
    415: "unsupported_media_type",
    416: "invalid_range",
    429: "queue_full, rate_limit_exceeded, too_many_requests; see Retry-After",
    500: "internal_error, and of a synchronous request what its video failed with",
    503: "service_unavailable: the job store does not answer",
    504: "timeout: the job goes on",
}
ALWAYS = (401, 403, 429, 500, 503)
BODY = (400, 404, 408, 409, 413, 415)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _header(name: str, about: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}


def _query(name: str, about: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": about, "schema": schema}


KEY = _header("Idempotency-Key", "1 to 255 characters: one job however often the request is sent")
STATES = _header("x-raydistill-extended-status", "1: what was cancelled has the status cancelled")
PAGE = (
    _query("limit", "how many", type="integer", minimum=0, maximum=100, default=20),
    _query("order", "by time", enum=["asc", "desc"], default="desc"),
    _query("after", "the id before the first one", type="string"),
)
VARIANT = _query("variant", "which file", enum=["video", "thumbnail", "spritesheet"], default="video")
AFTER = (
    _header("Last-Event-ID", "number of the last event that is known"),
    _query("after", "the same, for clients that cannot set headers", type="integer", minimum=0, default=0),
)


@dataclass(frozen=True)
class _Path:
    """What one path takes and answers."""

    kinds: tuple[str, ...] = (JSON,)
    fails: tuple[int, ...] = ()
    parameters: tuple[dict[str, Any], ...] = ()
    more: tuple[tuple[int, str], ...] = ()
    """Further successes: status and meaning."""
    takes: bool = False
    """Whether it has a body."""
    open: bool = False
    """Whether it needs no key."""


VIDEOS, ONE = "/v1/videos", "/v1/videos/{video_id}"
PATHS = {
    ("post", VIDEOS): _Path(fails=BODY, parameters=(KEY, STATES), takes=True),
    ("post", f"{VIDEOS}/sync"): _Path((MP4,), (*BODY, 504), (KEY,), takes=True),
    ("post", f"{ONE}/remix"): _Path(fails=BODY, parameters=(KEY, STATES), takes=True),
    ("get", VIDEOS): _Path(fails=(400, 404), parameters=(*PAGE, STATES)),
    ("get", ONE): _Path(fails=(404,), parameters=(STATES,)),
    ("delete", ONE): _Path(fails=(404,)),
    ("post", f"{ONE}/cancel"): _Path(fails=(404, 409), parameters=(STATES,)),
    ("get", f"{ONE}/content"): _Path(
        (MP4, WEBP),
        (400, 404, 409, 410, 416),
        (VARIANT, _header("Range", "bytes=FIRST-LAST"), _header("If-None-Match", "an ETag")),
        ((206, "the part that was asked for"), (304, "as it was"), (307, "where the storage has it")),
    ),
    ("get", f"{ONE}/events"): _Path(
        (STREAM,), (400, 404), (*AFTER, STATES), ((204, "it has ended, and all its events are known"),)
    ),
    ("get", "/v1/models"): _Path(),
    ("get", "/v1/models/{model_id}"): _Path(fails=(404,)),
    ("get", "/v1/admin/workers"): _Path(),
    ("get", "/metrics"): _Path((TEXT,)),
    ("get", "/health"): _Path(open=True),
    ("get", "/ready"): _Path(open=True),
}


def describe(app: FastAPI) -> None:
    """Let /openapi.json say what the functions behind the paths do not declare themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            made["components"] = {
                "schemas": {"Error": ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            }
            for (method, path), about in PATHS.items():
                _fill(made["paths"][path][method], about)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi


def _fill(entry: dict[str, Any], about: _Path) -> None:
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    fails = (500, 503) if about.open else (*ALWAYS, *about.fails)
    answers: dict[str, Any] = {"200": {"description": "done", "content": {kind: {} for kind in about.kinds}}}
    answers |= {str(status): {"description": meaning} for status, meaning in about.more}
    answers |= {str(n): {"description": CODES[n], "content": error} for n in sorted(fails)}
    entry["responses"] = answers
    in_path = [one for one in entry.get("parameters", []) if one["in"] == "path"]
    entry["parameters"] = [*in_path, *about.parameters]
    if not about.open:
        entry["security"] = [{"key": []}]
    if about.takes:
        content = {kind: {"schema": VideoRequest.model_json_schema()} for kind in (JSON, *FORMS)}
        entry["requestBody"] = {"required": True, "content": content}
