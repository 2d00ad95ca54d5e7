"""What keeps others out and the server up: slow and huge requests, pages of other sites, API keys."""

import http.client
import json
import select
import socket
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from bundle_cases import save_untrained_bundle
from service_cases import serving, settings
from service_clients import Answer, ask, create

from raydistill.errors import InvalidValue
from raydistill.service.keys import ANYBODY, ApiKeys

GOOD = json.dumps({"prompt": "a red square"}).encode()
MINE = "/v1/videos"
NEEDS_KEY = {"auth": {"required": True}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def serve(bundle, tmp_path_factory):
    """Start a server without workers, each over a store of its own."""
    with ExitStack() as running:
        yield lambda **changes: running.enter_context(
            serving(settings(tmp_path_factory.mktemp("serve"), bundle, **changes), workers=0)
        )


def head(length: int | str, method: str = "POST", path: str = MINE) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n".encode()


def opened(server, first: bytes) -> socket.socket:
    """Connect, and send the beginning of a request."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(first)
    return connection


def answered(connection: socket.socket) -> Answer:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return Answer(answer.status, answer.headers, answer.read())


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended the connection; waits for it."""
    with suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


@pytest.mark.parametrize("length", [257 * 1024, 10**12, 10**17])
def test_what_says_it_is_too_large_is_refused_before_it_is_sent(serve, length):
    server = serve(limits={"body_kib": 256})
    with closing(opened(server, head(length))) as connection:  # not one byte of the body
        answer = answered(connection)
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert answer.headers["connection"] == "close"
        assert is_closed(connection)
    exactly = b'{"prompt": "a"}'.ljust(256 * 1024)
    assert ask(server, "POST", MINE, exactly).status == 200
    assert ask(server, "POST", MINE, exactly + b" ").status == 413


def test_a_length_that_is_none_never_reaches_the_server(serve):
    server = serve()
    for length in ("9" * 5000, "-1", "1e3", "x", "", "0x10"):
        with closing(opened(server, head(length) + b"{}")) as connection:
            assert answered(connection).status == 400


def test_what_turns_out_too_large_is_refused_before_it_has_all_come(serve):
    server = serve(limits={"body_kib": 256})
    first = f"POST {MINE} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with closing(opened(server, first)) as connection:
        chunk, sent = b"%x\r\n%s\r\n" % (1 << 16, b"a" * (1 << 16)), 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 1 << 30 and not select.select([connection], [], [], 0)[0]:
                connection.sendall(chunk)
                sent += len(chunk)
        assert 256 * 1024 < sent < 1 << 25
        answer = answered(connection)
    assert (answer.status, answer.code) == (413, "request_too_large")
    with closing(opened(server, first + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD))) as connection:
        assert answered(connection).status == 200


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_stalls_is_given_up(serve, drips):
    server = serve(limits={"body_timeout_s": 0.5})
    began = time.monotonic()
    with closing(opened(server, head(1000) + GOOD)) as connection:
        while drips and not select.select([connection], [], [], 0.05)[0]:
            connection.sendall(b" ")  # a little now and then is not enough
        answer = answered(connection)
        assert time.monotonic() - began >= 0.45
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert is_closed(connection)
    assert time.monotonic() - began < 5
    assert server.store.load().queued == 0
    with closing(opened(server, head(len(GOOD)))) as connection:
        time.sleep(0.2)  # slow, but not too slow
        connection.sendall(GOOD)
        assert answered(connection).status == 200


def test_so_many_bodies_may_be_open_and_no_more(serve):
    server = serve(limits={"open_bodies": 3, "body_timeout_s": 30.0})
    with ExitStack() as stack:
        stalled = [stack.enter_context(closing(opened(server, head(len(GOOD))))) for _ in range(3)]
        while (answer := ask(server, "POST", MINE, GOOD)).status != 429:  # until all three were seen
            time.sleep(0.01)
        assert (answer.code, answer.headers["retry-after"]) == ("too_many_requests", "1")
        assert answer.headers["x-should-retry"] == "true"
        assert ask(server, "GET", MINE).status == 200
        stalled[0].close()  # the client gives up
        deadline = time.monotonic() + 10
        while ask(server, "POST", MINE, GOOD).status != 200:
            assert time.monotonic() < deadline
        for connection in stalled[1:]:
            connection.sendall(GOOD)
            assert answered(connection).status == 200
    assert [ask(server, "POST", MINE, GOOD).status for _ in range(5)] == [200] * 5


def test_two_hundred_connections_that_stall_do_not_slow_an_honest_client(serve):
    calm, busy = (serve(limits={"body_timeout_s": 60.0}) for _ in range(2))
    took = {calm: [], busy: []}
    half = len(GOOD) // 2
    with ExitStack() as stack:
        firsts = [head(len(GOOD))[:40], head(len(GOOD)) + GOOD[:half]]
        stalled = [
            (first, stack.enter_context(closing(opened(busy, first)))) for first in firsts for _ in range(100)
        ]
        for server in [calm, busy] * 5:  # what is new is slow
            create(server)
        for server in [calm, busy] * 40:
            began = time.monotonic()
            create(server)
            took[server].append(time.monotonic() - began)
        usual, disturbed = (sorted(took[server])[37] for server in (calm, busy))
        assert disturbed <= 2 * usual + 0.05
        for first, connection in stalled:  # all of them were waited for all the time
            connection.sendall((head(len(GOOD)) + GOOD)[len(first) :])
            assert answered(connection).status == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://evil.example"}, "cross_origin"),
        ({"Origin": "null"}, "cross_origin"),
        ({"Origin": "http://127.0.0.1:1"}, "cross_origin"),
        ({"Host": "evil.example"}, "wrong_host"),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "wrong_host"),  # a name led here
        ({"Host": "localhost.evil.example:80"}, "wrong_host"),
        ({"Host": ""}, "wrong_host"),
        ({"Host": "localhost:1234"}, None),
        ({"Host": "[::1]:1234"}, None),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, None),
    ],
)
def test_pages_of_others_are_kept_out(serve, headers, code):
    server = serve()
    answer = ask(server, "POST", MINE, GOOD, headers)
    assert answer.status == (403 if code else 200)
    assert code is None or answer.code == code
    assert server.store.load().queued == (0 if code else 1)


def test_where_keys_are_required_any_name_will_do_but_no_foreign_page(serve):
    server = serve(**NEEDS_KEY)
    key = {"Authorization": f"Bearer {ApiKeys(server.store.database).create('me', ['generate'])}"}
    named = {**key, "Host": "videos.example"}
    assert ask(server, "POST", MINE, GOOD, named).status == 200
    assert ask(server, "POST", MINE, GOOD, {**named, "Origin": "https://videos.example"}).status == 200
    answer = ask(server, "POST", MINE, GOOD, {**named, "Origin": "https://evil.example"})
    assert (answer.status, answer.code) == (403, "cross_origin")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_opens_until_it_is_revoked(serve):
    server = serve(**NEEDS_KEY)
    keys = ApiKeys(server.store.database)
    key = keys.create("me", ["generate"])
    assert ask(server, "GET", MINE, headers=bearer(key)).status == 200
    assert ask(server, "GET", MINE, headers={"Authorization": f"bearer  {key} "}).status == 200
    wrong = [{}, bearer(key[:-1]), bearer(key + "a"), bearer(""), bearer("\xfc"), {"Authorization": key}]
    for headers in [*wrong, {"Authorization": f"Basic {key}"}]:
        answer = ask(server, "POST", MINE, GOOD, headers)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    keys.revoke("me")
    assert ask(server, "GET", MINE, headers=bearer(key)).code == "invalid_api_key"
    assert server.store.load().queued == 0
    for name in ("me", ANYBODY, "", "a b", "a" * 65):  # also the name of one that was revoked
        with pytest.raises(InvalidValue):
            keys.create(name, ["generate"])
    with pytest.raises(InvalidValue):
        keys.revoke("me")


def test_without_a_key_nothing_but_health_and_the_page_is_shown(serve):
    server = serve(**NEEDS_KEY)
    paths = ask(server, "GET", "/openapi.json").json["paths"]
    answers = {}
    for path, methods in paths.items():
        filled = path.replace("{video_id}", f"video_{'0' * 32}").replace("{model_id}", "tiny")
        for method in methods:
            answers[method, path] = ask(server, method.upper(), filled).status
            assert str(answers[method, path]) in methods[method]["responses"]
    assert {call for call, status in answers.items() if status != 401} == {
        ("get", "/health"),
        ("get", "/ready"),
    }
    assert ask(server, "GET", "/").status == 200


def test_guessing_keys_ends_soon(serve):
    server = serve(auth={"required": True, "failures_per_minute": 3})
    answers = [ask(server, "GET", MINE, headers=bearer(f"rd-{n}")) for n in range(5)]
    assert [answer.status for answer in answers] == [401, 401, 401, 429, 429]
    assert answers[-1].code == "rate_limit_exceeded"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    valid = ApiKeys(server.store.database).create("neighbour", ["generate"])  # behind the same address
    assert ask(server, "GET", MINE, headers=bearer(valid)).status == 200
    assert ask(server, "GET", "/health").status == 200


def test_tenants_do_not_see_each_other_and_an_admin_sees_all(serve):
    server = serve(**NEEDS_KEY)
    keys = ApiKeys(server.store.database)
    one, other = (bearer(keys.create(name, ["generate"])) for name in ("one", "other"))
    admin = bearer(keys.create("boss", ["admin"]))
    mine = ask(server, "POST", MINE, GOOD, one).json["id"]
    path = f"{MINE}/{mine}"
    calls = [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel")]
    for method, action in [*calls, ("POST", "/remix")]:
        answer = ask(server, method, path + action, GOOD if action == "/remix" else None, other)
        assert (answer.status, answer.code) == (404, "video_not_found")
    assert ask(server, "GET", f"{MINE}?after={mine}", headers=other).status == 404
    assert ask(server, "GET", MINE, headers=other).json["data"] == []
    for headers in (one, admin):
        assert ask(server, "GET", path, headers=headers).json["status"] == "queued"
        assert [v["id"] for v in ask(server, "GET", MINE, headers=headers).json["data"]] == [mine]
    same = {"Idempotency-Key": "k"}  # each tenant has keys of its own
    ids = {ask(server, "POST", MINE, GOOD, {**who, **same}).json["id"] for who in (one, other, one)}
    assert len(ids) == 2
    again = {**other, "x-stainless-retry-count": "1"}
    assert ask(server, "POST", MINE, b'{"prompt": "b"}', one).status == 200
    assert ask(server, "POST", MINE, b'{"prompt": "b"}', again).json["id"] not in ids
    assert len(ask(server, "GET", MINE, headers=other).json["data"]) == 2


def test_a_scope_is_needed_for_what_concerns_all(serve):
    server = serve(**NEEDS_KEY)
    keys = ApiKeys(server.store.database)
    for path in ("/metrics", "/v1/admin/workers"):
        assert ask(server, "GET", path).code == "invalid_api_key"
        answer = ask(server, "GET", path, headers=bearer(keys.create(f"u{len(path)}", ["generate"])))
        assert (answer.status, answer.code) == (403, "insufficient_scope")
        assert ask(server, "GET", path, headers=bearer(keys.create(f"a{len(path)}", ["admin"]))).status == 200
    for scopes in ([], ["root"]):
        with pytest.raises(InvalidValue):
            keys.create("new", scopes)


def test_a_key_is_kept_nowhere(serve, caplog):
    server = serve(**NEEDS_KEY)
    keys = ApiKeys(server.store.database)
    key = keys.create("me", ["generate"])
    assert len(key) >= 43
    for headers in (bearer(key), bearer(key + "x")):
        ask(server, "POST", MINE, GOOD, headers)
    folder = Path(server.config.artifacts).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("jobs.sqlite") for path in files)
    assert all(key[3:].encode() not in path.read_bytes() for path in files)
    assert b"me" in b"".join(path.read_bytes() for path in files)
    assert key[3:] not in caplog.text
    (shown,) = keys.list()
    assert "hash" not in shown
    assert shown["name"] == "me"
