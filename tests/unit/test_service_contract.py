"""The interface as the official client and old ones use it, over real HTTP: create, read, list, bytes."""

import io
import json
import shutil
from pathlib import Path

import openai
import pytest
from bundle_cases import conformance_bundles, save_untrained_bundle
from conformance import CONFORMANCE, QUEUED_JOBS
from PIL import Image
from service_cases import serving, settings
from service_clients import ask, made, official

from raydistill.service.schema import FORMS, PATHS

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a red square moves left"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    """A server with a worker for all tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("serve")
    config = settings(
        folder, bundle, bundles=conformance_bundles(folder, bundle), limits={"queued_jobs": QUEUED_JOBS}
    )
    with serving(config) as running:
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


@pytest.mark.parametrize("check", CONFORMANCE, ids=lambda check: check.__name__)
def test_clients_may_rely_on_it(server, check):
    check(server)


def test_a_deleted_videos_files_are_removed_with_it(server, client):
    given = made(server)
    folder = Path(server.config.artifacts) / "videos"
    assert list(folder.glob(given["id"]))
    client.videos.delete(given["id"])
    assert not list(folder.glob(given["id"]))


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
    assert [one.id for one in models] == ["tiny", "broken", "long"]
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
    assert (ready.status, ready.json["status"], ready.json["models"]) == (
        200,
        "ready",
        ["tiny", "broken", "long"],
    )
    schema = ask(server, "GET", "/openapi.json").json
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", *FORMS}
    assert all(kind["schema"]["required"] == ["prompt"] for kind in body.values())
    described = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert described == PATHS.keys()  # each with what it answers, and nothing that FastAPI thinks it does
    assert all("422" not in schema["paths"][path][method]["responses"] for method, path in described)
    listing = schema["paths"]["/v1/videos"]["get"]["parameters"]
    for one in (one for one in listing if one["in"] == "query"):
        assert ask(server, "GET", f"/v1/videos?{one['name']}=%00").status in (400, 404)
    unknown = ask(server, "GET", "/v1/videos?model=tiny")
    assert (unknown.status, unknown.code) == (400, "unknown_parameter")
    for path in ("/", "/health", "/ready"):
        head = ask(server, "HEAD", path)
        assert (head.status, head.body) == (200, b"")


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
