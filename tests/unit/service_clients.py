"""Clients of a server under test: plain HTTP, the official client, and a proxy that loses answers."""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends a reset."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @cached_property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Code of the error in the envelope, which has to be whole."""
        error = self.json["error"]
        assert self.json.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
        assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
        return error["code"]


def ask(server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """Send one request and read its answer; a body that is not bytes goes as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with_type = {"content-type": "application/json"} if body is not None else {}
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, sent, {**with_type, **(headers or {})})
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def create(server, **values: Any) -> dict[str, Any]:
    """Make a video by plain JSON; it has to be accepted."""
    answer = ask(server, "POST", "/v1/videos", {"prompt": "a red square moves left", **values})
    assert answer.status == 200, answer.body
    return answer.json


def show(server, video_id: str) -> dict[str, Any]:
    """Return a video as it is now."""
    answer = ask(server, "GET", f"/v1/videos/{video_id}")
    assert answer.status == 200, answer.body
    return answer.json


def until(found, timeout_s: float = 60.0):
    """Call until it gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.01)
    return value


def settled(server, video_id: str) -> dict[str, Any]:
    """Wait until a video has ended, and return it."""

    def ended():
        video = show(server, video_id)
        return video if video["status"] not in ("queued", "in_progress") else None

    return until(ended)


def made(server, **values: Any) -> dict[str, Any]:
    """Make a video and wait until it is there."""
    video = settled(server, create(server, **values)["id"])
    assert video["status"] == "completed", video
    return video


def total(server, name: str, **labels: str) -> float:
    """Sum of a metric over all labels that are not given."""
    text = ask(server, "GET", "/metrics").body.decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    assert any(one.name.startswith("raydistill_") for one in samples)
    return sum(
        one.value
        for one in samples
        if one.name == f"raydistill_{name}" and labels.items() <= one.labels.items()
    )


@contextmanager
def stream(server, video_id: str, after: int = 0):
    """Open an event stream, as soon as there is a place for it."""

    def opened():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": str(after)})
        answer = connection.getresponse()
        return (connection, answer) if answer.status == 200 else connection.close()

    connection, answer = until(opened)
    assert answer.headers["content-type"].startswith("text/event-stream")
    try:
        yield events(answer)
    finally:
        answer.close()
        connection.close()


def events(answer):
    """Read (id, kind, data) one by one."""
    lines = []
    for raw in answer:
        if line := raw.decode().rstrip("\r\n"):
            lines.append(line)
            continue
        fields = dict(one.split(": ", 1) for one in lines if not one.startswith(":"))
        lines = []
        if fields:
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])


def follow(server, video_id: str, after: int = 0):
    with stream(server, video_id, after) as told:
        return list(told)


def official(
    url: str,
    key: str = "unused",
    *,
    retries: int = 0,
    sent: list[Any] | None = None,
    answered: list[Any] | None = None,
):
    """Return the official client; requests that leave it are appended to `sent`, answers to `answered`."""
    lists = {"request": sent, "response": answered}
    hooks = {when: [one.append] for when, one in lists.items() if one is not None}
    plain = openai.DefaultHttpxClient(event_hooks=hooks, trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, http_client=plain)


class Cutting:
    """A proxy that lets the first request through and resets the connection once its answer has come."""

    def __init__(self, port: int, cuts: int = 1):
        """In front of a server on this port; so many answers are lost."""
        self.server, self.cuts = port, cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                upstream = socket.create_connection(("127.0.0.1", self.server))
                for way in ((client, upstream, False), (upstream, client, True)):
                    threading.Thread(target=self._pass, args=way, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.cuts:
                    self.cuts -= 1
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RD)
            end.close()


@contextmanager
def cutting(server, cuts: int = 1) -> Iterator[Cutting]:
    """Put a proxy in front of a server."""
    proxy = Cutting(server.port, cuts)
    try:
        yield proxy
    finally:
        proxy.close()
