"""A thousand requests that nobody should send: each is refused in the envelope, and leaves nothing behind."""

import gc
import http.client
import json
import os
import socket
from collections import Counter
from contextlib import suppress
from urllib.parse import quote

import psutil
import pytest
from bundle_cases import save_untrained_bundle
from hypothesis import given
from hypothesis import settings as search
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from service_cases import serving, settings
from service_clients import Answer, ask, create
from sqlalchemy import func, select

from raydistill.service.requests import FIELDS, WRAPPERS
from raydistill.service.tables import EVENTS, JOBS, KEYS_SEEN, TOTALS

CODES = {
    400: {
        "invalid_value", "unknown_parameter", "missing_parameter", "unsupported_size", "prompt_too_long",
        "cost_too_high", "invalid_json", "invalid_form",
    },
    403: {"cross_origin", "wrong_host"},
    404: {"video_not_found", "model_not_found", "not_found"},
    405: {"method_not_allowed"},
    409: {"idempotency_key_reused", "video_failed", "video_not_cancellable"},
    413: {"request_too_large"},
    415: {"unsupported_media_type"},
}  # fmt: skip
GROWTH = 50 * 2**20
CRLF = b"\r\n"


class Target:
    """A server without a worker, and a connection that sends bytes as they are."""

    def __init__(self, server):
        self.server, self.codes = server, Counter[str]()
        self.ended = create(server)["id"]
        ask(server, "POST", f"/v1/videos/{self.ended}/cancel")
        self._connection = None

    def send(self, method: bytes, target: bytes, headers=(), body: bytes | None = None) -> Answer:
        """Send one request over a connection that stays open as long as the server leaves it so."""
        lines = [method + b" " + target + b" HTTP/1.1", b"host: 127.0.0.1"]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"content-length: %d" % len(body)] if body is not None else []
        if self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=30)
        connection, self._connection = self._connection, None
        with suppress(BrokenPipeError, ConnectionResetError):  # what is too large is answered before its end
            connection.sendall(CRLF.join([*lines, b"", body or b""]))
        answer = http.client.HTTPResponse(connection, method=method.decode())
        answer.begin()
        whole = Answer(answer.status, answer.headers, answer.read())
        if answer.will_close:
            connection.close()
        else:
            self._connection = connection
        return whole

    def written(self):
        """Rows of the store, and files."""
        tables = (JOBS, EVENTS, KEYS_SEEN, TOTALS)
        counts = [select(func.count()).select_from(one).scalar_subquery() for one in tables]
        with self.server.store.database.read() as connection:
            rows = tuple(connection.execute(select(*counts)).one())
        return rows, [files for _, _, files in os.walk(self.server.config.artifacts)]

    def obeys(self, method: bytes, target: bytes, headers=(), body: bytes | None = None) -> int:
        """The law: a refusal of a known code that wrote nothing, or what turned out to be good."""
        before = self.written()
        answer = self.send(method, target, headers, body)
        if 200 <= answer.status < 300:
            self.codes["good"] += 1
            return answer.status
        assert 400 <= answer.status < 500, (answer.status, answer.body)
        if method != b"HEAD":
            assert answer.code in CODES[answer.status], answer.body
            self.codes[answer.code] += 1
        assert self.written() == before
        return answer.status

    def is_well(self, since: int) -> None:
        """It serves as before, and is not larger by what all those requests were."""
        create(self.server)
        gc.collect()
        assert psutil.Process().memory_info().rss - since < GROWTH


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    bundle = save_untrained_bundle(tmp_path_factory.mktemp("bundle"))
    config = settings(tmp_path_factory.mktemp("serve"), bundle, limits={"queued_jobs": 10**6})
    with serving(config, workers=0) as server:
        yield Target(server)


@pytest.fixture
def memory(target):
    for size in (100, 10**6):  # buffers that stay are there already
        target.obeys(b"POST", b"/v1/videos", body=b'{"prompt": "%s"}' % (b"a" * size))
    assert target.codes["prompt_too_long"]
    gc.collect()
    return psutil.Process().memory_info().rss


def run(target, law, examples: int, **strategies) -> Counter[str]:
    """Try so many examples, and return how often each code was the answer."""
    target.codes = Counter()
    search(max_examples=examples)(given(**strategies)(law))()
    return target.codes


def mixed(*choices):
    """Choose among strategies, each given with how often."""
    return st.sampled_from([one for often, one in choices for _ in range(often)]).flatmap(lambda one: one)


TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # with lone surrogates
ODD_TEXT = st.sampled_from(
    ["", " ", "\0", "\ud800", "\u202eabc", "a\nb", "../../etc/passwd", "%00", "'; DROP TABLE jobs; --",
     "\u0663", "32x32x", "32x-32", "0x0", "99999x99999", "2+tail\0", "nan", "inf", "1e999", "1" * 5000,
     "true", "{}"]
)  # fmt: skip
RARE = st.sampled_from(
    [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 50_000 + b"]" * 50_000, b"tru", b"'a'", b"\xff",
     b"", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'"' + b"a" * 1_000_000 + b'"',
     b'"' + b"a" * 2_000_000 + b'"']
)  # fmt: skip
ODD_JSON = st.sampled_from(
    [b"1e308", b"-1e308", b"1000000000", b"-1", b"0", b"-0.0", b"2.5", b"1e-320", b"9223372036854775808",
     b"4", b'"\\ud83d"', b'{"prompt":"a"}', b'"{\\"prompt\\":\\"a\\"}"', b"[1,2]", b"{}", b'"2"',
     b'"32x32"', b"true", b"null"]
)  # fmt: skip
NUMBER = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | NUMBER | TEXT | ODD_TEXT
TREE = st.recursive(PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXT, one, max_size=3))
DUMPED = TREE.map(lambda value: json.dumps(value).encode())
VALUE = mixed((6, ODD_JSON), (4, DUMPED), (1, RARE))
OURS = st.sampled_from([*FIELDS, *WRAPPERS])
NAME = mixed((8, OURS), (1, TEXT), (1, ODD_TEXT))


def as_object(pairs) -> bytes:
    """JSON by hand: names may come twice, and values be none."""
    return b"{" + b",".join(json.dumps(name).encode() + b":" + value for name, value in pairs) + b"}"


PAIRS = st.lists(st.tuples(NAME, VALUE), max_size=3)
PROMPTED = PAIRS.map(lambda pairs: as_object([("prompt", b'"a"'), *pairs]))
BODY = mixed((12, PROMPTED), (1, PAIRS.map(as_object)), (1, VALUE), (1, st.binary(max_size=60)))
JSON = b"application/json"
TYPES = [
    b"application/json; charset=utf-16", b"", b"text/plain", b"application/xml", b"\xff",
    b"APPLICATION/JSON ;;", b"multipart/form-data", b"application/x-www-form-urlencoded",
]  # fmt: skip


def test_bodies(target, memory):
    def law(body, cut, kind, remixed):
        path = f"/v1/videos/{target.ended}/remix" if remixed else "/v1/videos"
        target.obeys(b"POST", path.encode(), [(b"content-type", kind)], body[: len(body) - cut])

    kinds = st.sampled_from([JSON] * 12 + TYPES)
    cuts = st.sampled_from([0] * 12 + [1, 7])
    seen = run(target, law, 350, body=BODY, cut=cuts, kind=kinds, remixed=st.booleans())
    assert seen.keys() >= {"good", "invalid_json", "invalid_value", "unknown_parameter", "missing_parameter"}
    assert seen.keys() >= {"request_too_large", "unsupported_media_type"}
    target.is_well(memory)


BRACKETS = st.sampled_from(
    ["a[", "a]", "[]", "prompt[]", "prompt[a]", "a[b][c][d][e][f]", "extra_params[seed]", "a[[b]]",
     "[a]", "a" * 10_000, "extra_params[seed][]", "extra_params[a][b]", "extra_params[prompt]"]
)  # fmt: skip
PART = st.tuples(
    mixed((3, OURS), (2, BRACKETS), (1, TEXT)),
    TEXT | ODD_TEXT,
    st.sampled_from(["", "", "", '; filename="a.png"', "; filename*=x''y"]),
)
BOUNDARIES = [b"; boundary=x"] * 6 + [b"", b"; boundary=", b"; boundary=y", b"; charset=idna; boundary=x"]


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def as_parts(parts) -> bytes:
    """A multipart body by hand: its headers and values hold anything."""
    out = b""
    for name, value, more in parts:
        head = f'content-disposition: form-data; name="{name}"{more}'
        out += CRLF.join([b"--x", as_bytes(head), b"", as_bytes(value), b""])
    return out + b"--x--" + CRLF


def as_fields(parts) -> bytes:
    """An urlencoded body with names as they are."""
    pairs = ((as_bytes(name), quote(value, errors="replace").encode()) for name, value, _ in parts)
    return b"&".join(name + b"=" + value for name, value in pairs)


def test_forms(target, memory):
    def law(parts, times, boundary, cut, urlencoded):
        parts = [("prompt", "a", ""), *parts * times]
        body = as_fields(parts) if urlencoded else as_parts(parts)
        kind = TYPES[7] if urlencoded else TYPES[6] + boundary
        target.obeys(b"POST", b"/v1/videos", [(b"content-type", kind)], body[: len(body) - cut])

    strategies = {
        "parts": st.lists(PART, max_size=3),
        "times": st.sampled_from([1] * 8 + [60]),
        "boundary": st.sampled_from(BOUNDARIES),
        "cut": st.sampled_from([0] * 6 + [3, 20]),
        "urlencoded": st.sampled_from([False, False, True]),
    }
    seen = run(target, law, 250, **strategies)
    assert seen.keys() >= {"good", "invalid_form", "invalid_value", "unknown_parameter"}
    target.is_well(memory)


METHODS = [b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"HEAD", b"TRACE"]
READ = [(b"GET", f"/v1/videos/{{}}{part}") for part in ("", "/content", "/events")]
CHANGED = [(b"POST", "/v1/videos/{}/cancel"), (b"POST", "/v1/videos/{}/remix"), (b"DELETE", "/v1/videos/{}")]
CALLS = [*READ, *CHANGED, *[(b"GET", "/v1/videos")] * 4, (b"POST", "/v1/videos"), (b"GET", "/v1/models/{}")]
PATHS = [path for _, path in CALLS] + ["/{}", "/v1/{}", "//{}", "/v1/admin/{}", "/v1/videos/{}/{}"]
ODD_ID = st.sampled_from(
    ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "%", "%zz", "%ff", "video_", "video_" + "0" * 32,
     "/", "sync", "video_" + "g" * 32, "a" * 9000, "%0d%0aset-cookie:x", "*", "video_%00", "'",
     "%F0%9F%92%A9", "VIDEO_" + "0" * 32]
)  # fmt: skip
ID = ODD_ID | TEXT.map(lambda text: quote(text, safe="", errors="replace"))
QUERY = st.sampled_from(
    ["", "limit=-1", "limit=1e3", "limit=" + "9" * 5000, "limit=%D9%A3", "limit=", "order=up",
     "order=asc&order=desc", "after=x", "after=%00", "after=video_" + "0" * 32, "variant=x", "variant=",
     "variant=video&variant=x", "&&&", "limit=100&after=", "%00=%00", "a=" + "b" * 9000, "=",
     "limit=1&limit=x"]
)  # fmt: skip
OTHER_QUERY = TEXT.map(lambda text: quote(text, safe="=&", errors="replace"))
SHOWN = st.binary(max_size=40).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F))
RAW = SHOWN | st.sampled_from(
    [b"bytes=", b"bytes=-", b"bytes=9-1", b"bytes=" + b"9" * 300 + b"-", b"bytes=0-0,1-1", b"bytes=\xb2-",
     b"-1", b"9" * 5000, b"\xb2", b"*", b'W/"x', b"a" * 60_000, b"Bearer", b"null", b"1e9", b"\t", b""]
)  # fmt: skip
HEADER = st.sampled_from(
    [b"range", b"if-range", b"if-none-match", b"last-event-id", b"idempotency-key",
     b"x-stainless-retry-count", b"x-request-id", b"authorization", b"accept", b"cookie",
     b"x-raydistill-extended-status", b"x-forwarded-for", b"accept-encoding", b"expect", b"host",
     b"origin"]
)  # fmt: skip


def test_addresses_methods_and_headers(target, memory):
    def law(call, name, query, headers, ours):
        method, path = call
        filled = path.format(*[target.ended if ours and method != b"DELETE" else name] * 2)
        good = path in ("/v1/videos", "/v1/videos/{}/remix")  # elsewhere it might be answered with a video
        body = None if method == b"GET" else b'{"prompt": "a"}' if good else b"{}"
        target.obeys(method, f"{filled}?{query}".encode("ascii", "ignore"), headers, body)

    strategies = {
        "call": mixed(
            (4, st.sampled_from(CALLS)), (1, st.tuples(st.sampled_from(METHODS), st.sampled_from(PATHS)))
        ),
        "name": ID,
        "query": mixed((4, QUERY), (1, OTHER_QUERY)),
        "headers": st.lists(st.tuples(HEADER, RAW), max_size=3),
        "ours": st.booleans(),
    }
    seen = run(target, law, 250, **strategies)
    assert seen.keys() >= {"good", "not_found", "video_not_found", "model_not_found", "method_not_allowed"}
    assert seen.keys() >= {"invalid_value", "cross_origin", "wrong_host"}
    target.is_well(memory)


def test_what_breaks_the_schema_of_the_server_itself(target, memory):
    paths = ask(target.server, "GET", "/openapi.json").json["paths"]
    every = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    taking = [(method, path) for method, path in every if "requestBody" in paths[path][method.lower()]]
    assert sorted(taking) == [
        ("POST", "/v1/videos"), ("POST", "/v1/videos/sync"), ("POST", "/v1/videos/{video_id}/remix"),
    ]  # fmt: skip
    schema = paths["/v1/videos"]["post"]["requestBody"]["content"][JSON.decode()]["schema"]
    valid = Draft202012Validator(schema)

    def law(call, name, value, video, more):
        method, path = call
        more = True if path.endswith("sync") else more  # else it might be answered with a video
        prompt = [] if name == "prompt" else [("prompt", b'"a"')]
        body = as_object([*prompt, (name, value), *([("nobody_knows_this", b"1")] if more else [])])
        filled = path.replace("{video_id}", target.ended if call in taking else video).replace(
            "{model_id}", video
        )
        status = target.obeys(method.encode(), filled.encode(), [(b"content-type", JSON)], body)
        assert str(status) in paths[path][method.lower()]["responses"]
        # What is a number may come as text, as forms have it.
        if call in taking and not value.startswith(b'"') and not follows(valid, body):
            assert status >= 400, body

    strategies = {
        "call": st.sampled_from([*every, *taking * 10]),
        "name": st.sampled_from(sorted(schema["properties"])),
        "value": VALUE,
        "video": ID,
        "more": st.sampled_from([False, False, False, True]),
    }
    seen = run(target, law, 150, **strategies)
    assert seen.keys() >= {"good", "invalid_value", "unknown_parameter", "video_not_found"}
    target.is_well(memory)


def follows(valid: Draft202012Validator, body: bytes) -> bool:
    """Whether a body is JSON as the schema says."""
    try:
        # No constant is one: int() raises ValueError for NaN.
        return valid.is_valid(json.loads(body, parse_constant=int))
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/..%2fapi.py", "/%2e%2e/api.py", "/page%2findex.html", "/api.py"]
)
def test_no_file_but_those_of_the_page_is_handed_out(target, path):
    answer = target.send(b"GET", path.encode())
    assert (answer.status, answer.code) == (404, "not_found")
