"""What any client may rely on, asked of a server by its URL alone: once in process and once on Ray Serve.

A server has `url` and `port`, the models `tiny`, `broken` (its detail expert gives NaN) and `long` (whose
plan "2+tail" has more than a thousand steps), and may hold other videos.
"""

import io
import json
import math
import re

import av
import openai
import pytest
from service_clients import (
    ask,
    create,
    cutting,
    follow,
    made,
    official,
    settled,
    show,
    stream,
    total,
    until,
)

PROMPT = "a red square moves left"
LONG = {"model": "long", "plan": "2+tail"}
REQUIRED = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt",
    "size", "seconds", "remixed_from_video_id", "error",
}  # fmt: skip
QUEUED_JOBS = 70
"""Limit of the queue of a server that is asked these things."""


def listed(server) -> list[str]:
    """Ids of all videos, newest first."""
    return [
        video.id for page in official(server.url).videos.list(limit=100).iter_pages() for video in page.data
    ]


def a_form_makes_a_video_and_every_key_of_the_resource_is_there(server):
    client = official(server.url)
    extra = {"num_inference_steps": 2, "seed": 7, "fps": 8, "guidance_scale": 2.0}
    given = client.videos.create(prompt=PROMPT, model="tiny", seconds="2", size="32x32", extra_body=extra)
    shown = given.to_dict()
    assert shown.keys() == REQUIRED | {"x_raydistill"}
    assert (given.object, given.status, given.progress, given.error) == ("video", "queued", 0, None)
    assert (given.prompt, given.model, given.seconds, given.size) == (PROMPT, "tiny", "2", "32x32")
    about = shown["x_raydistill"]
    assert {k: about[k] for k in ("plan", "num_steps", "seed", "fps", "num_frames")} == {
        "plan": "2", "num_steps": 2, "seed": 7, "fps": 8, "num_frames": 16,
    }  # fmt: skip
    assert client.videos.poll(given.id, poll_interval_ms=20).status == "completed"


def json_of_older_clients_makes_the_same_video_as_a_form(server):
    values = {"prompt": PROMPT, "model": "tiny", "seconds": "2", "size": "32x32"}
    given = official(server.url).videos.create(**values, extra_body={"seed": 7})
    videos = [settled(server, create(server, **values, seed=7)["id"]), settled(server, given.id)]
    same = [(v["x_raydistill"]["latents_sha256"], v["prompt"], v["size"], v["seconds"]) for v in videos]
    assert same[0] == same[1]


def what_is_refused_has_a_code_a_parameter_and_a_request_id_and_makes_nothing(server):
    before, client = listed(server), official(server.url)
    refused = [
        ({"input_reference": ("a.png", b"\x89PNG", "image/png")}, "invalid_value", "input_reference"),
        ({"extra_body": {"input_reference": {"image_url": "https://example.com/a.png"}}}, "invalid_value",
         "input_reference"),
        ({"extra_body": {"num_inference_stepz": 4}}, "unknown_parameter", "num_inference_stepz"),
        ({"extra_body": {"seed": [1, 2]}}, "invalid_value", "seed"),
        ({"size": "33x33"}, "unsupported_size", "size"),
    ]  # fmt: skip
    for given, code, param in refused:
        with pytest.raises(openai.BadRequestError) as error:
            client.videos.create(**{"prompt": PROMPT, **given})
        assert (error.value.code, error.value.param, bool(error.value.request_id)) == (code, param, True)
    assert listed(server) == before


def create_and_poll_gives_a_video_that_plays(server):
    client = official(server.url)
    given = client.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=20, extra_body={"plan": "2+tail"})
    assert (given.status, given.progress, given.error) == ("completed", 100, None)
    assert given.completed_at >= given.created_at
    assert given.expires_at > given.completed_at
    timings = given.to_dict()["x_raydistill"]["timings"]
    assert all(timings[f"{stage}_s"] > 0 for stage in ("queue", "encode", "denoise", "decode"))
    assert timings["passes"] == 14  # two of the student, six of the guided teacher
    data = client.videos.download_content(given.id).read()
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 16
    assert frames[0].shape == (32, 32, 3)


def polling_a_job_that_fails_raises_nothing(server):
    client = official(server.url)
    given = client.videos.create_and_poll(
        prompt=PROMPT, model="broken", poll_interval_ms=20, extra_body={"num_inference_steps": 4}
    )
    assert (given.status, given.error.code) == ("failed", "generation_failed")
    assert "NaN" in given.error.message
    with pytest.raises(openai.ConflictError) as refused:
        client.videos.download_content(given.id)
    assert refused.value.code == "video_failed"
    assert client.videos.create_and_poll(prompt=PROMPT, model="broken", poll_interval_ms=20).status == (
        "completed"  # its default plan leaves the broken expert out
    )


def listing_goes_over_pages_in_both_orders(server):
    ids = [create(server, num_inference_steps=1)["id"] for _ in range(7)]
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        sent = []
        pages = list(official(server.url, sent=sent).videos.list(limit=3, order=order).iter_pages())
        found = [video.id for page in pages for video in page.data]
        assert [one for one in found if one in ids] == wanted
        assert len(set(found)) == len(found)
        assert len(sent) == len(pages) == math.ceil(len(found) / 3)
        assert [len(page.data) for page in pages[:-1]] == [3] * (len(pages) - 1)
        assert [page.has_more for page in pages] == [True] * (len(pages) - 1) + [False]
        assert all((page.data[0].id, page.data[-1].id) == (page.first_id, page.last_id) for page in pages)
    assert ask(server, "GET", "/v1/videos?limit=0").json == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": True,
    }  # fmt: skip


def a_deleted_video_is_gone_at_once(server):
    given, sent = made(server), []
    client = official(server.url, retries=2, sent=sent)
    gone = client.videos.delete(given["id"])
    assert gone.to_dict() == {"id": given["id"], "object": "video.deleted", "deleted": True}
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError) as missing:
            call(given["id"])
        assert missing.value.code == "video_not_found"
    assert len(sent) == 4


def deleting_what_runs_stops_it_within_a_step(server):
    begun = create(server, **LONG)["id"]
    until(lambda: show(server, begun)["x_raydistill"]["step"])
    assert ask(server, "DELETE", f"/v1/videos/{begun}").status == 200
    passes = total(server, "passes_total", model="long")
    assert passes >= 1
    assert ask(server, "GET", f"/v1/videos/{begun}").code == "video_not_found"
    made(server, num_inference_steps=8)  # more steps than one, and by the same replica if there is but one
    assert total(server, "passes_total", model="long") == passes
    assert total(server, "leased_jobs") == 0


def content_before_it_is_ready_is_asked_for_once(server):
    sent = []
    client = official(server.url, retries=2, sent=sent)
    given = client.videos.create(prompt=PROMPT, model="long", extra_body={"plan": "2+tail"})
    with pytest.raises(openai.ConflictError) as early:
        client.videos.download_content(given.id)
    assert early.value.code == "video_not_ready"
    assert len(sent) == 2
    client.videos.delete(given.id)


def parts_of_the_file(server):
    path = f"/v1/videos/{made(server)['id']}/content"
    whole = ask(server, "GET", path)
    size, etag = len(whole.body), whole.headers["etag"]
    assert (whole.status, whole.headers["content-type"]) == (200, "video/mp4")
    assert (whole.headers["content-length"], whole.headers["accept-ranges"]) == (str(size), "bytes")
    wanted = {
        "bytes=0-9": slice(0, 10), "bytes=100-": slice(100, None), "bytes=-7": slice(-7, None),
        f"bytes=5-{size * 2}": slice(5, None), f"bytes=-{size * 2}": slice(0, None),
    }  # fmt: skip
    for value, part in wanted.items():
        answer = ask(server, "GET", path, headers={"range": value})
        first, last, _ = part.indices(size)
        assert (answer.status, answer.body) == (206, whole.body[part])
        assert answer.headers["content-range"] == f"bytes {first}-{last - 1}/{size}"
    for value in (f"bytes={size}-", "bytes=-0"):
        answer = ask(server, "GET", path, headers={"range": value})
        assert (answer.status, answer.code) == (416, "invalid_range")
        assert answer.headers["content-range"] == f"bytes */{size}"
    for value in ("bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes=9-3"):  # what a server may leave alone
        assert ask(server, "GET", path, headers={"range": value}).body == whole.body
    same = ask(server, "GET", path, headers={"range": "bytes=0-9", "if-range": etag})
    other = ask(server, "GET", path, headers={"range": "bytes=0-9", "if-range": '"another"'})
    assert (same.status, other.status, other.body) == (206, 200, whole.body)
    for value in (etag, f'"x", W/{etag}', "*"):
        answer = ask(server, "GET", path, headers={"if-none-match": value})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    head = ask(server, "HEAD", path)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(size))


def a_request_whose_answer_was_lost_is_sent_again_and_makes_one_job(server):
    for headers in ({}, {"Idempotency-Key": f"mine {server.port}"}):
        before, sent = listed(server), []
        with cutting(server) as proxy:
            client = official(proxy.url, retries=2, sent=sent)
            given = client.videos.create(prompt=f"{PROMPT} {len(headers)}", extra_headers=headers)
        assert [one.headers["x-stainless-retry-count"] for one in sent] == ["0", "1"]
        assert listed(server) == [given.id, *before]


def a_full_queue_says_when_to_come_again(server):
    until(lambda: total(server, "running_jobs") + total(server, "queued_jobs") == 0)
    given = [create(server, **LONG)["id"] for _ in range(QUEUED_JOBS)]
    with pytest.raises(openai.RateLimitError) as full:
        official(server.url).videos.create(prompt=PROMPT)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    for one in given:
        assert ask(server, "DELETE", f"/v1/videos/{one}").status == 200
    made(server)


def events_tell_the_whole_story_and_any_rest_of_it(server):
    begun = create(server, num_inference_steps=4)["id"]
    live = follow(server, begun)
    ids, kinds = [one[0] for one in live], [one[1] for one in live]
    assert ids == sorted(set(ids))
    assert kinds[0] == "video.queued"
    assert live[-1][1:] == ("video.completed", {"video": show(server, begun)})
    told = [data for _, kind, data in live if kind == "video.in_progress"]
    stages = [(one["stage"], one["step"]) for one in told]
    assert stages == [("denoise", 0), *(("denoise", n) for n in (1, 2, 3, 4)), ("decode", 4)]
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)
    previews = [data for _, kind, data in live if kind == "video.partial_frame"]
    assert [(one["index"], one["step"], one["format"]) for one in previews] == [
        (0, 1, "webp"), (1, 2, "webp"), (2, 3, "webp"),
    ]  # fmt: skip
    whole = follow(server, begun)
    assert [(n, kind) for n, kind, _ in whole] == list(zip(ids, kinds, strict=True))
    for k in range(len(whole)):
        assert follow(server, begun, after=whole[k - 1][0] if k else 0) == whole[k:]
    over = ask(server, "GET", f"/v1/videos/{begun}/events", headers={"Last-Event-ID": str(ids[-1])})
    assert (over.status, over.body) == (204, b"")  # a browser's EventSource ends with it
    watched = create(server, **LONG)["id"]
    with stream(server, watched) as running:  # as it happens, not when it is over
        first = next(data for _, kind, data in running if kind == "video.in_progress" and data["step"])
    assert first["step"] < first["num_steps"] / 2
    ended = ask(server, "POST", f"/v1/videos/{watched}/cancel").json
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")


def the_synchronous_request_answers_with_the_file(server):
    answer = ask(server, "POST", "/v1/videos/sync", {"prompt": PROMPT, "seed": 3})
    assert (answer.status, answer.headers["content-type"]) == (200, "video/mp4")
    video = show(server, answer.headers["x-raydistill-video-id"])
    assert answer.body == ask(server, "GET", f"/v1/videos/{video['id']}/content").body
    assert re.fullmatch(r"[0-9a-f-]{32,36}", answer.headers["x-request-id"])
    assert (answer.headers["x-model"], answer.headers["x-raydistill-seed"]) == ("tiny", "3")
    stages = json.loads(answer.headers["x-stage-durations"])
    timings = video["x_raydistill"]["timings"]
    assert stages == {name: timings[f"{name}_s"] for name in ("queue", "encode", "denoise", "decode")}
    worked = sum(stages[name] for name in ("encode", "denoise", "decode"))
    assert float(answer.headers["x-inference-time-s"]) == pytest.approx(worked, abs=1e-5)


CONFORMANCE = [
    a_form_makes_a_video_and_every_key_of_the_resource_is_there,
    json_of_older_clients_makes_the_same_video_as_a_form,
    what_is_refused_has_a_code_a_parameter_and_a_request_id_and_makes_nothing,
    create_and_poll_gives_a_video_that_plays,
    polling_a_job_that_fails_raises_nothing,
    listing_goes_over_pages_in_both_orders,
    a_deleted_video_is_gone_at_once,
    deleting_what_runs_stops_it_within_a_step,
    content_before_it_is_ready_is_asked_for_once,
    parts_of_the_file,
    a_request_whose_answer_was_lost_is_sent_again_and_makes_one_job,
    a_full_queue_says_when_to_come_again,
    events_tell_the_whole_story_and_any_rest_of_it,
    the_synchronous_request_answers_with_the_file,
]
