"""What clients do about failures: requests sent again, full queues, quotas, error codes, another ingress."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import openai
import pytest
from bundle_cases import save_untrained_bundle
from service_cases import serving, settings
from service_clients import ask, create, made, official, settled, show, until
from sqlalchemy import func, select

from raydistill.service.keys import ApiKeys
from raydistill.service.tables import JOBS

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a blue circle moves up"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def serve(bundle, tmp_path):
    """Start a server without workers; all of a test have one store."""
    with ExitStack() as running:
        yield lambda **changes: running.enter_context(
            serving(settings(tmp_path, bundle, **changes), workers=0)
        )


def rows(server, table=JOBS) -> int:
    with server.store.database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_without_a_retry_the_same_request_makes_another_job(serve):
    server = serve(keep={"retry_window_s": 1.5})
    again = {"x-stainless-retry-count": "1"}
    body = {"prompt": PROMPT}
    first, second = create(server, **body), create(server, **body)
    assert ask(server, "POST", "/v1/videos", body, again).json["id"] == second["id"] != first["id"]
    assert ask(server, "POST", "/v1/videos", {**body, "seed": 1}, again).json["id"] != second["id"]
    assert rows(server) == 3
    time.sleep(1.6)  # what is sent again later is meant
    assert ask(server, "POST", "/v1/videos", body, again).json["id"] != second["id"]
    nonsense = {"x-stainless-retry-count": "9" * 5000}
    assert ask(server, "POST", "/v1/videos", {**body, "seed": 2}, nonsense).status == 200


def test_a_key_stands_for_one_request(serve):
    server, key = serve(), {"Idempotency-Key": "k" * 255}
    client = official(server.url, retries=2)
    first = client.videos.create(prompt=PROMPT, extra_headers=key)
    assert client.videos.create(prompt=PROMPT, extra_headers=key).id == first.id
    with pytest.raises(openai.ConflictError) as other:
        client.videos.create(prompt="another", extra_headers=key)
    assert other.value.code == "idempotency_key_reused"
    assert rows(server) == 1
    client.videos.delete(first.id)
    assert client.videos.create(prompt=PROMPT, extra_headers=key).id != first.id
    for wrong in ("", "k" * 256, "\xfcber"):
        answer = ask(server, "POST", "/v1/videos", {"prompt": PROMPT}, {"Idempotency-Key": wrong})
        assert (answer.status, answer.json["error"]["param"]) == (400, "Idempotency-Key")


def test_a_key_is_forgotten_after_its_time(serve):
    server, key = serve(keep={"idempotency_s": 0.1}), {"Idempotency-Key": "k"}
    first = ask(server, "POST", "/v1/videos", {"prompt": PROMPT}, key).json
    time.sleep(0.15)
    assert ask(server, "POST", "/v1/videos", {"prompt": "another"}, key).json["id"] != first["id"]


def test_a_full_queue_says_when_to_come_again_and_the_client_does(serve):
    server = serve(limits={"queued_jobs": 1})
    first = create(server)
    with pytest.raises(openai.RateLimitError) as full:
        official(server.url).videos.create(prompt=PROMPT)
    assert full.value.code == "queue_full"
    wait_s = float(full.value.response.headers["retry-after"])
    assert wait_s >= 1
    assert ask(server, "GET", "/ready").json["status"] == "queue_full"
    answered = []

    def make_room():
        until(lambda: answered)
        ask(server, "POST", f"/v1/videos/{first['id']}/cancel")

    room = threading.Thread(target=make_room)
    room.start()
    began = time.monotonic()
    second = official(server.url, retries=1, answered=answered).videos.create(prompt=PROMPT)
    assert time.monotonic() - began >= wait_s
    assert [one.status_code for one in answered] == [429, 200]
    room.join()
    assert (second.status, rows(server)) == ("queued", 2)


def test_what_the_queue_takes_is_a_sum_of_costs_too(serve):
    cost = 4 * 16 * 32 * 32 / 1e6  # passes times megapixels
    server = serve(limits={"queued_cost": 2.5 * cost, "cost": 1.5 * cost})
    for _ in range(2):
        create(server)
    assert ask(server, "POST", "/v1/videos", {"prompt": PROMPT}).code == "queue_full"
    create(server, num_inference_steps=2)
    answer = ask(server, "POST", "/v1/videos", {"prompt": PROMPT, "num_inference_steps": 8})
    assert (answer.status, answer.code) == (400, "cost_too_high")


def test_a_key_has_its_quota(serve):
    server = serve(auth={"required": True})
    keys = ApiKeys(server.store.database)
    often = official(server.url, keys.create("often", ["generate"], per_minute=2))
    held = official(server.url, keys.create("held", ["generate"], active_jobs=2))
    for client in (often, held):
        given = [client.videos.create(prompt=PROMPT) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as limited:
            client.videos.create(prompt=PROMPT)
        assert limited.value.code == "rate_limit_exceeded"
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
        client.videos.delete(given[0].id)
    held.videos.create(prompt=PROMPT)  # one ended: there is room again


def test_every_refusal_has_its_code_and_class(serve):
    server = serve(auth={"required": True}, limits={"queued_jobs": 1, "body_kib": 4})
    keys = ApiKeys(server.store.database)
    client = official(server.url, keys.create("me", ["generate"]))
    given = client.videos.create(prompt=PROMPT)
    key, admins = {"Idempotency-Key": "k"}, "/admin/workers"
    refused = [
        (openai.BadRequestError, "prompt_too_long", lambda: client.videos.create(prompt="a" * 2001)),
        (openai.BadRequestError, "invalid_value", lambda: client.videos.list(limit=101)),
        (
            openai.BadRequestError,
            "invalid_value",
            lambda: client.get(f"/videos?limit={'9' * 5000}", cast_to=dict),
        ),
        (openai.AuthenticationError, "invalid_api_key", official(server.url, "rd-wrong").models.list),
        (
            openai.PermissionDeniedError,
            "insufficient_scope",
            lambda: client.get(admins, cast_to=dict),
        ),
        (openai.NotFoundError, "video_not_found", lambda: client.videos.retrieve(f"video_{'0' * 32}")),
        (openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("sora-2")),
        (openai.NotFoundError, "not_found", lambda: client.post("/chat/completions", cast_to=dict)),
        (openai.NotFoundError, "not_found", lambda: client.get("/videos/", cast_to=dict)),
        (openai.ConflictError, "video_not_ready", lambda: client.videos.download_content(given.id)),
        (openai.APIStatusError, "method_not_allowed", lambda: client.put("/videos", cast_to=dict)),
        (openai.APIStatusError, "request_too_large", lambda: client.videos.create(prompt="a" * 5000)),
        (openai.RateLimitError, "queue_full", lambda: client.videos.create(prompt=PROMPT, extra_headers=key)),
    ]
    for kind, code, call in refused:
        with pytest.raises(kind) as error:
            call()
        assert (error.value.code, bool(error.value.request_id)) == (code, True)
        assert json.loads(error.value.response.text).keys() == {"error"}
        assert error.value.type
    assert rows(server) == 1


def test_other_methods_are_named(serve):
    answer = ask(serve(), "DELETE", "/v1/videos")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) & {"GET", "POST"}


def test_two_ingresses_over_one_store_answer_for_each_other(bundle, tmp_path):
    config = settings(tmp_path, bundle)
    with serving(config) as one, serving(config, workers=0) as two:
        given = made(one)
        assert show(two, given["id"]) == given
        path = f"/v1/videos/{given['id']}/content"
        assert ask(two, "GET", path).body == ask(one, "GET", path).body
        assert [v["id"] for v in ask(two, "GET", "/v1/videos").json["data"]] == [given["id"]]
        assert ask(two, "DELETE", f"/v1/videos/{given['id']}").status == 200
        assert ask(one, "GET", f"/v1/videos/{given['id']}").code == "video_not_found"
        assert settled(one, create(two)["id"])["status"] == "completed"


def burst(both, headers=None):
    """Send twelve requests at once, to either in turn."""
    with ThreadPoolExecutor(12) as pool:
        return list(
            pool.map(lambda i: ask(both[i % 2], "POST", "/v1/videos", {"prompt": PROMPT}, headers), range(12))
        )


def test_one_key_sent_to_two_ingresses_at_once_makes_one_job(serve):
    both, key = (serve(), serve()), {"Idempotency-Key": "k"}
    with ThreadPoolExecutor(12) as pool:
        sent = [
            pool.submit(ask, both[i % 2], "POST", "/v1/videos", {"prompt": PROMPT}, key) for i in range(12)
        ]
        answers = [one.result() for one in sent]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert rows(both[0]) == 1


def test_a_burst_over_two_ingresses_fills_the_queue_to_its_limit_and_no_further(serve):
    both = (serve(limits={"queued_jobs": 5}), serve(limits={"queued_jobs": 5}))
    assert sorted(answer.status for answer in burst(both)) == [200] * 5 + [429] * 7
