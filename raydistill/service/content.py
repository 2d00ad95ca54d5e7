"""A video's bytes over HTTP: ranges, entity tags, variants."""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from raydistill.errors import RequestRefused
from raydistill.service.files import Files
from raydistill.service.http import refusal
from raydistill.service.tables import Job

Variant = Literal["video", "thumbnail", "spritesheet"]
MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/webp"}
RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


def content(job: Job, variant: str, request: Request, files: Files, *, redirect: bool) -> Response:
    """Answer with a finished job's file, or the part of it that is asked for.

    A range outside the file is answered 416. Raises RequestRefused: 400 for another variant, 409 while it is
    not there, 410 when it is no more.
    """
    entry = _entry(job, variant)
    if redirect:
        return RedirectResponse(files.signed(entry["file"]), 307)
    headers = {
        "etag": f'"{entry["sha256"]}"',
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=3600",
        "content-disposition": f'inline; filename="{job.id}{"" if variant == "video" else "-" + variant}'
        f'.{entry["file"].rpartition(".")[2]}"',
        "x-content-type-options": "nosniff",
    }
    if _matches(request.headers.get("if-none-match"), headers["etag"]):
        return Response(status_code=304, headers=headers)
    size, wanted = entry["bytes"], request.headers.get("range")
    if wanted and request.headers.get("if-range", headers["etag"]) != headers["etag"]:
        wanted = None  # a range of another version: the whole of this one
    try:
        part = _range(wanted, size)
    except RequestRefused as refused:
        answer = refusal(refused)
        answer.headers["content-range"] = f"bytes */{size}"
        return answer
    start, end = part or (0, size)
    if part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    status = 206 if part else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=MEDIA[variant])
    pieces = files.chunks(entry["file"], start, end)
    first = next(pieces, b"")  # before the answer begins: a file that is lost is not a short one
    return StreamingResponse(chain([first], pieces), status, headers, MEDIA[variant])


def _entry(job: Job, variant: str) -> Mapping[str, Any]:
    """The file that is asked for. Raises RequestRefused if it is not there."""
    if variant not in MEDIA:
        raise RequestRefused(400, "invalid_value", f"variant is one of {', '.join(MEDIA)}", "variant")
    if not job.ended:
        raise RequestRefused(
            409, "video_not_ready", "this video is not finished: poll it, or follow its events"
        )
    if job.state != "completed" or job.result is None:
        raise RequestRefused(409, "video_failed", f"there is no video: {job.error_message}")
    if job.expired:
        raise RequestRefused(410, "video_expired", "this video was kept as long as promised, and is removed")
    return job.result[variant]


def _matches(given: str | None, etag: str) -> bool:
    tags = [one.strip().removeprefix("W/") for one in (given or "").split(",")]
    return etag in tags or "*" in tags


def _range(wanted: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive); None for the whole, also for several, unknown or invalid ones (RFC 9110)."""
    match = RANGE.fullmatch(wanted) if wanted else None
    if match is None or (match[1], match[2]) == ("", ""):
        return None
    if match[1] and match[2] and int(match[1]) > int(match[2]):
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if start >= size or start >= end:
        raise RequestRefused(416, "invalid_range", f"the file has {size} bytes", "range")
    return start, end
