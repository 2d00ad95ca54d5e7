"""The interface as the official client and old ones use it, over real HTTP: create, read, list, bytes."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import openai
import pytest
from bundle_cases import CODEC, save_untrained_bundle, sources_of
from PIL import Image
from service_cases import serving, settings
from service_clients import ask, create, made, official, settled

from raydistill.service.export import export_bundle
from raydistill.student import load_student, read_card, save_student

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
REQUIRED = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt",
    "size", "seconds", "remixed_from_video_id", "error",
}  # fmt: skip
PROMPT = "a red square moves left"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def broken(bundle, tmp_path_factory):
    """A bundle whose detail expert gives NaN: made by exporting a student with infinite weights."""
    student, teacher = sources_of(bundle)
    card, plans = read_card(student)
    fields = load_student(student, teacher, merged=False).fields
    for weight in fields["detail"].parameters():
        weight.data.fill_(float("inf"))
    folder = tmp_path_factory.mktemp("broken")
    semantic = load_student(student, teacher).fields["semantic"]
    one_of_ours = {name: plan for name, plan in plans.items() if name != "2+tail"}
    save_student(folder / "student", replace(card), semantic, fields["detail"], one_of_ours)
    made = export_bundle(folder / "student", CODEC, folder / "b", name="broken", fps=8, default_plan="1")
    return made.folder


@pytest.fixture(scope="module")
def server(bundle, broken, tmp_path_factory):
    """A server with a worker for all tests that leave nothing behind."""
    bundles = {"tiny": str(bundle), "broken": str(broken)}
    with serving(settings(tmp_path_factory.mktemp("serve"), bundle, bundles=bundles)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return official(server.url)


@pytest.fixture
def idle(bundle, tmp_path):
    """A server of its own without a worker: jobs stay queued."""
    with serving(settings(tmp_path, bundle), workers=0) as running:
        yield running


@pytest.fixture(scope="module")
def refusing(bundle, tmp_path_factory):
    """A server without a worker for what is refused, and so never in its queue."""
    with serving(settings(tmp_path_factory.mktemp("refusing"), bundle), workers=0) as running:
        yield running


@pytest.fixture(scope="module")
def video(server):
    return made(server, seed=5)


def jobs(server) -> int:
    return server.store.load().queued


def test_a_form_makes_a_video_and_every_key_of_the_resource_is_there(client):
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


def test_json_of_older_clients_makes_the_same_video_as_a_form(server, client):
    values = {"prompt": PROMPT, "model": "tiny", "seconds": "2", "size": "32x32", "seed": 7}
    given = client.videos.create(**{k: v for k, v in values.items() if k != "seed"}, extra_body={"seed": 7})
    videos = [settled(server, create(server, **values)["id"]), settled(server, given.id)]
    same = [(v["x_raydistill"]["latents_sha256"], v["prompt"], v["size"], v["seconds"]) for v in videos]
    assert same[0] == same[1]


@pytest.mark.parametrize("wrapper", ["extra_params", "extra_body"])
@pytest.mark.parametrize("as_text", [False, True])
def test_further_parameters_may_come_wrapped(idle, wrapper, as_text):
    inner = {"num_inference_steps": 2, "seed": 11}
    body = {wrapper: json.dumps(inner) if as_text else inner}
    given = official(idle.url).videos.create(prompt=PROMPT, extra_body=body)
    about = given.to_dict()["x_raydistill"]
    assert (about["plan"], about["seed"]) == ("2", 11)


REFERENCE = {"image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"input_reference": ("a.png", b"\x89PNG", "image/png")}, "invalid_value", "input_reference"),
        ({"extra_body": {"input_reference": REFERENCE}}, "invalid_value", "input_reference"),
        ({"extra_body": {"seed": True}}, "invalid_value", "seed"),
        ({"extra_body": {"seed": [1, 2]}}, "invalid_value", "seed"),
        ({"extra_body": {"extra_params": {"num_inference_steps": {"a": 1}}}}, "invalid_value",
         "num_inference_steps"),
        ({"extra_body": {"num_inference_stepz": 4}}, "unknown_parameter", "num_inference_stepz"),
        ({"extra_body": {"extra_params": {"sed": 4}}}, "unknown_parameter", "sed"),
        ({"size": "33x33"}, "unsupported_size", "size"),
        ({"size": "32x32x"}, "invalid_value", "size"),
        ({"seconds": "9"}, "unsupported_size", "seconds"),
        ({"prompt": " "}, "invalid_value", "prompt"),
        ({"extra_body": {"flow_shift": 9}}, "invalid_value", "flow_shift"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_by_name(refusing, given, code, param):
    with pytest.raises(openai.BadRequestError) as refused:
        official(refusing.url).videos.create(**{"prompt": PROMPT, **given})
    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.request_id
    assert jobs(refusing) == 0


def test_the_nearest_known_name_is_offered(refusing):
    with pytest.raises(openai.BadRequestError, match="did you mean 'num_inference_steps'"):
        official(refusing.url).videos.create(prompt=PROMPT, extra_body={"num_inference_step": 4})


def test_a_file_is_no_prompt(refusing):
    body = b'--x\r\ncontent-disposition: form-data; name="prompt"; filename="p.txt"\r\n\r\nhello\r\n--x--\r\n'
    answer = ask(refusing, "POST", "/v1/videos", body, {"content-type": "multipart/form-data; boundary=x"})
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_value", "prompt")
    assert jobs(refusing) == 0


def test_create_and_poll_gives_a_video_that_plays(client):
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


def test_polling_a_job_that_fails_raises_nothing(client):
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


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_listing_goes_over_three_pages_in_both_orders(idle, order):
    ids = [create(idle)["id"] for _ in range(7)]
    sent = []
    pages = list(official(idle.url, sent=sent).videos.list(limit=3, order=order).iter_pages())
    assert [len(page.data) for page in pages] == [3, 3, 1]
    assert [page.has_more for page in pages] == [True, True, False]
    assert len(sent) == 3
    assert [v.id for page in pages for v in page.data] == (ids if order == "asc" else ids[::-1])
    assert all((page.data[0].id, page.data[-1].id) == (page.first_id, page.last_id) for page in pages)
    assert ask(idle, "GET", "/v1/videos?limit=0").json == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": True,
    }  # fmt: skip


def test_a_deleted_video_is_gone_at_once(server, client):
    given, sent = made(server), []
    gone = client.videos.delete(given["id"])
    assert gone.to_dict() == {"id": given["id"], "object": "video.deleted", "deleted": True}
    assert not list((Path(server.config.artifacts) / "videos").glob(given["id"]))
    again = official(server.url, retries=2, sent=sent)
    for call in (again.videos.retrieve, again.videos.delete, again.videos.download_content):
        with pytest.raises(openai.NotFoundError) as missing:
            call(given["id"])
        assert missing.value.code == "video_not_found"
    assert len(sent) == 3


def test_content_before_it_is_ready_is_asked_for_once(idle):
    sent = []
    client = official(idle.url, retries=2, sent=sent)
    given = client.videos.create(prompt=PROMPT)
    with pytest.raises(openai.ConflictError) as early:
        client.videos.download_content(given.id)
    assert early.value.code == "video_not_ready"
    assert len(sent) == 2


def test_parts_of_the_file(server, video):
    path = f"/v1/videos/{video['id']}/content"
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
    for value in (f"bytes={size}-", "bytes=-0", "bytes=9-3"):
        answer = ask(server, "GET", path, headers={"range": value})
        assert (answer.status, answer.code) == (416, "invalid_range")
    for value in ("bytes=0-1,3-4", "lines=0-1", "bytes=a-b"):  # what a server may leave alone
        assert ask(server, "GET", path, headers={"range": value}).body == whole.body
    same = ask(server, "GET", path, headers={"range": "bytes=0-9", "if-range": etag})
    other = ask(server, "GET", path, headers={"range": "bytes=0-9", "if-range": '"another"'})
    assert (same.status, other.status, other.body) == (206, 200, whole.body)
    for value in (etag, f'"x", W/{etag}', "*"):
        answer = ask(server, "GET", path, headers={"if-none-match": value})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    head = ask(server, "HEAD", path)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(size))


@pytest.mark.parametrize(("variant", "size"), [("thumbnail", (32, 32)), ("spritesheet", (128, 128))])
def test_pictures_of_the_video(client, video, variant, size):
    answer = client.videos.download_content(video["id"], variant=variant)
    assert answer.response.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(answer.read())) as picture:
        assert (picture.format, picture.size) == ("WEBP", size)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.download_content(video["id"], variant="poster")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "variant")


def test_models_say_what_may_be_asked_of_them(server, client):
    models = client.models.list().data
    assert [one.id for one in models] == ["tiny", "broken"]
    about = models[0].to_dict()["x_raydistill"]
    assert (about["steps"], about["default_plan"], about["fps"]) == ([1, 2, 4, 8], "4", 8)
    assert about["shapes"] == [{"size": "32x32", "num_frames": 16}]
    assert about["plans"]["2"] == {"num_steps": 2, "passes": 2, "experts": ["semantic", "detail"]}
    assert about["bundles"] == {server.ingress.catalog.labels[0]: 1.0}
    assert client.models.retrieve("tiny").to_dict() == models[0].to_dict()
    for plan in about["plans"]:  # nothing is promised that is not accepted
        given = client.videos.create(prompt=PROMPT, model="tiny", extra_body={"plan": plan})
        assert given.to_dict()["x_raydistill"]["num_steps"] == about["plans"][plan]["num_steps"]
        client.videos.delete(given.id)


def test_health_and_the_schema_need_nothing(server):
    assert ask(server, "GET", "/health").json == {"status": "ok"}
    ready = ask(server, "GET", "/ready")
    assert (ready.status, ready.json["status"], ready.json["models"]) == (200, "ready", ["tiny", "broken"])
    schema = ask(server, "GET", "/openapi.json").json
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data"}
    assert body["application/json"]["schema"]["required"] == ["prompt"]


def test_an_error_of_ours_names_the_request_for_the_log(server, caplog):
    given = made(server)
    shutil.rmtree(Path(server.config.artifacts) / "videos" / given["id"])
    answer = ask(server, "GET", f"/v1/videos/{given['id']}/content")
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.headers["x-request-id"] in answer.json["error"]["message"]
    assert "artifacts" not in answer.body.decode()
    assert any(record.exc_info for record in caplog.records)
    own = ask(server, "GET", f"/v1/videos/{given['id']}/content", headers={"x-request-id": "mine-1"})
    assert own.json["error"]["message"].endswith("mine-1")
