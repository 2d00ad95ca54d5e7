"""From acceptance to the end: cancelling, deleting, remixing, waiting, following, expiry, totals."""

import json
import socket
import time
from contextlib import ExitStack

import openai
import pytest
import sqlalchemy as sa
from bundle_cases import save_untrained_bundle
from service_cases import serving, settings, start_worker
from service_clients import ask, create, follow, made, official, settled, show, stream, total, until

from raydistill.consistency.schedule import TimeGrid
from raydistill.service.files import Files
from raydistill.service.tables import SPEEDS
from raydistill.service.upkeep import Janitor

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a green triangle moves right"
LONG = {"plan": "2+tail"}
"""More than a thousand steps in the bundle made here."""
EXTENDED = {"x-raydistill-extended-status": "1"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"), grid=TimeGrid(4000))


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    with serving(settings(tmp_path_factory.mktemp("serve"), bundle)) as running:
        yield running


@pytest.fixture
def serve(bundle, tmp_path):
    """A server of the test's own; `workers` as in `serving`."""
    with ExitStack() as running:
        yield lambda workers=1, **changes: running.enter_context(
            serving(settings(tmp_path, bundle, **changes), workers=workers)
        )


@pytest.mark.parametrize(("method", "path"), [("POST", "/cancel"), ("DELETE", "")])
def test_work_on_what_is_no_longer_wanted_stops_at_the_next_step(serve, method, path):
    server = serve()
    began = time.monotonic()
    first = create(server, **LONG)["id"]
    step = until(lambda: (n := show(server, first)["x_raydistill"]["step"]) >= 10 and n)
    each_s = (time.monotonic() - began) / step
    second = create(server, num_inference_steps=1)["id"]  # waits for the thread that denoises
    assert show(server, second)["x_raydistill"]["step"] == 0
    assert ask(server, method, f"/v1/videos/{first}{path}").status == 200
    ended, passes = time.monotonic(), total(server, "passes_total")
    until(lambda: show(server, second)["x_raydistill"]["step"])
    assert time.monotonic() - ended < 30 * each_s  # of more than a thousand
    settled(server, second)
    assert passes <= total(server, "passes_total") <= passes + 1
    assert total(server, "jobs_cancelled_total") == 1
    assert total(server, "running_jobs") == total(server, "leased_jobs") == 0
    if method == "DELETE":
        assert ask(server, "GET", f"/v1/videos/{first}").code == "video_not_found"


def test_deleting_never_meets_the_worker_that_saves_the_state(server):
    for _ in range(12):
        begun = create(server, **LONG)["id"]
        until(lambda one=begun: show(server, one)["x_raydistill"]["step"])
        assert ask(server, "DELETE", f"/v1/videos/{begun}").json["deleted"]


def test_what_was_cancelled_has_failed_for_strict_clients(serve):
    server = serve(workers=0)
    given, path = create(server), "/v1/videos"
    first = ask(server, "POST", f"{path}/{given['id']}/cancel").json
    assert (first["status"], first["error"]["code"], first["progress"]) == ("failed", "cancelled", 0)
    assert first["completed_at"] >= first["created_at"]
    assert ask(server, "POST", f"{path}/{given['id']}/cancel").json == first  # again: the same
    for answer in (
        ask(server, "GET", f"{path}/{given['id']}", headers=EXTENDED).json,
        ask(server, "GET", path, headers=EXTENDED).json["data"][0],
        ask(server, "POST", f"{path}/{given['id']}/cancel", headers=EXTENDED).json,
    ):
        assert answer == {**first, "status": "cancelled"}
    assert official(server.url).videos.poll(given["id"]).error.code == "cancelled"
    assert follow(server, given["id"])[-1][1:] == ("video.failed", {"video": first})
    assert ask(server, "GET", f"{path}/{given['id']}/content").code == "video_failed"


def test_what_is_done_cannot_be_cancelled(server):
    given = made(server)
    answer = ask(server, "POST", f"/v1/videos/{given['id']}/cancel")
    assert (answer.status, answer.code) == (409, "video_not_cancellable")
    assert show(server, given["id"]) == given


def test_a_remix_starts_from_the_same_noise(server):
    base = made(server, prompt=PROMPT, num_inference_steps=2, seed=77)
    given = official(server.url).videos.remix(base["id"], prompt="a yellow circle")
    video = settled(server, given.id)
    assert given.remixed_from_video_id == video["remixed_from_video_id"] == base["id"]
    assert (video["prompt"], base["remixed_from_video_id"]) == ("a yellow circle", None)
    for name in ("seed", "plan", "num_frames", "bundle"):
        assert video["x_raydistill"][name] == base["x_raydistill"][name]
    assert video["x_raydistill"]["latents_sha256"] != base["x_raydistill"]["latents_sha256"]
    with pytest.raises(openai.NotFoundError):
        official(server.url).videos.remix(f"video_{'0' * 32}", prompt="a")


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ({"num_inference_steps": 4}, "4"), ({"plan": "1"}, "1"), ({"size": "32x32"}, "2"),
        ({"extra_params": {"num_inference_steps": 8}}, "8"), ({"seconds": "2", "plan": None}, "2"),
        ({"num_frames": 16, "seed": 5}, "2"),
    ],
)  # fmt: skip
def test_a_remix_may_say_otherwise_in_any_words(server, given, plan):
    base = made(server, num_inference_steps=2, seed=77)
    answer = ask(server, "POST", f"/v1/videos/{base['id']}/remix", {"prompt": PROMPT, **given})
    assert answer.status == 200, answer.body
    about = answer.json["x_raydistill"]
    assert (about["plan"], about["seed"]) == (plan, given.get("seed", 77))


def test_a_synchronous_request_that_takes_too_long_leaves_its_job(serve):
    server, sent = serve(workers=0, limits={"sync_timeout_s": 0.2}), []
    with pytest.raises(openai.InternalServerError) as late:
        official(server.url, retries=2, sent=sent).post("/videos/sync", body={"prompt": PROMPT}, cast_to=dict)
    assert (late.value.status_code, late.value.code, len(sent)) == (504, "timeout", 1)
    (video,) = ask(server, "GET", "/v1/videos").json["data"]
    assert video["status"] == "queued"
    assert video["id"] in late.value.message
    worker = start_worker(server.config)
    assert settled(server, video["id"])["status"] == "completed"
    worker.stop()


def test_who_hangs_up_on_a_synchronous_request_cancels_it(serve):
    server = serve(workers=0, limits={"streams": 1})
    body = json.dumps({"prompt": PROMPT}).encode()
    head = f"POST /v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        video = until(lambda: ask(server, "GET", "/v1/videos").json["data"])[0]
        second = ask(server, "POST", "/v1/videos/sync", {"prompt": PROMPT})
        assert (second.status, second.code) == (429, "too_many_requests")
        assert show(server, video["id"])["status"] == "queued"
    assert settled(server, video["id"])["error"]["code"] == "cancelled"
    assert len(ask(server, "GET", "/v1/videos").json["data"]) == 1
    with stream(server, video["id"]) as told:  # its place is free again
        assert next(told)[1] == "video.queued"


def test_clients_are_told_to_look_again_well_before_a_video_may_be_ready(serve):
    server, told = serve(workers=0), []
    for _ in range(6):
        answer = ask(server, "GET", f"/v1/videos/{create(server, plan='4')['id']}")
        told.append((answer.json["x_raydistill"]["eta_s"], int(answer.headers["openai-poll-after-ms"])))
        if len(told) == 1:  # nothing was measured before
            cost = 4 * 16 * 32 * 32 / 1e6  # passes times megapixels
            measured = {"bundle": server.ingress.catalog.labels[0], "seconds_per_cost": 3.0 / cost}
            with server.store.database.write() as connection:
                connection.execute(sa.insert(SPEEDS).values(measured))
    seconds = [6.0, 9.0, 12.0, 15.0, 18.0]  # three for each, and for each that waits before it
    assert [eta for eta, _ in told] == [None, *map(pytest.approx, seconds)]
    assert [wait for _, wait in told] == pytest.approx([250, 2000, 3000, 4000, 5000, 5000], abs=1)


def test_streams_are_limited_and_give_their_place_back_however_they_end(serve):
    server = serve(workers=0, limits={"streams": 2})
    kept, deleted = create(server)["id"], create(server)["id"]
    head = f"GET /v1/videos/{kept}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    for pause_s in (0.0, 0.02) * 5:  # gone before the first event, or while the next is waited for
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head)
            time.sleep(pause_s)
    with stream(server, kept) as first, stream(server, deleted) as second:
        assert next(first)[1:] == ("video.queued", {"position": 0})
        assert next(second)[1:] == ("video.queued", {"position": 1})
        refused = ask(server, "GET", f"/v1/videos/{kept}/events")
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (
            429,
            "too_many_requests",
            "1",
        )
        assert ask(server, "GET", f"/v1/videos/video_{'0' * 32}/events").code == "video_not_found"
        assert ask(server, "DELETE", f"/v1/videos/{deleted}").status == 200
        assert list(second) == []
        with stream(server, kept) as third:
            assert next(third)[1] == "video.queued"


def test_a_seed_is_a_video_and_one_that_was_drawn_is_told(server):
    digests, seeds = {}, (1, 2, 2**31, 2**63 - 1)
    for seed in (*seeds, *seeds):
        digest = made(server, seed=seed, num_inference_steps=2)["x_raydistill"]["latents_sha256"]
        assert digests.setdefault(seed, digest) == digest
    assert len(set(digests.values())) == len(seeds)
    drawn, other = (made(server)["x_raydistill"] for _ in range(2))
    assert drawn["seed"] != other["seed"]
    again = made(server, seed=drawn["seed"])["x_raydistill"]
    assert (again["seed"], again["latents_sha256"]) == (drawn["seed"], drawn["latents_sha256"])


def test_an_expired_video_is_gone_but_not_its_record(serve):
    server = serve(keep={"videos_s": 0.001, "orphans_s": 3600})
    given = made(server)
    files, path = Files(server.config.artifacts), f"/v1/videos/{given['id']}"
    assert ask(server, "GET", f"{path}/content").status == 200  # until the janitor comes
    assert files.folders("videos") == [given["id"]]
    janitor = Janitor(server.store.database, files, server.config.keep, 10.0)
    assert janitor.round(server.ingress.catalog.labels)["expired videos"] == 1
    assert janitor.round(server.ingress.catalog.labels)["expired videos"] == 0
    for variant in ("video", "thumbnail", "spritesheet"):
        with pytest.raises(openai.APIStatusError) as gone:
            official(server.url, retries=2).videos.download_content(given["id"], variant=variant)
        assert (gone.value.status_code, gone.value.code) == (410, "video_expired")
    assert show(server, given["id"]) == given
    assert files.folders("videos") == []


def test_totals_agree_with_what_was_done(serve):
    server = serve()
    for steps in (1, 2, 2, 4):
        made(server, num_inference_steps=steps)
    ask(server, "POST", "/v1/videos", {"prompt": ""})
    ask(server, "POST", f"/v1/videos/{create(server, **LONG)['id']}/cancel")
    until(lambda: total(server, "leased_jobs") == 0)
    label = server.ingress.catalog.labels[0]
    counts = {name: total(server, f"jobs_{name}_total") for name in ("accepted", "completed", "cancelled")}
    assert counts == {"accepted": 5, "completed": 4, "cancelled": 1}
    assert total(server, "jobs_completed_total", model="tiny", bundle=label) == 4
    assert total(server, "jobs_failed_total") == total(server, "queued_jobs") == 0
    assert total(server, "passes_total", expert="semantic") >= 1 + 1 + 1 + 2
    assert total(server, "passes_total", expert="detail") >= 0 + 1 + 1 + 2
    assert total(server, "job_seconds_count", state="completed") == 4
    assert total(server, "job_seconds_count", state="cancelled") == 1
    for stage in ("encode", "denoise", "decode"):
        assert total(server, "stage_seconds_bucket", stage=stage, le="+Inf") >= 4
    assert total(server, "stage_seconds_count", stage="decode") == 4
    videos = ask(server, "GET", "/v1/videos").json["data"]
    took = sum(v["x_raydistill"]["timings"]["total_s"] for v in videos)
    assert total(server, "job_seconds_sum") == pytest.approx(took)
    assert total(server, "replicas") == 1
