"""Artefacts in a folder and in an S3-compatible server of this process."""

import contextlib
import urllib.request
import uuid

import pytest
from bundle_cases import save_untrained_bundle
from service_cases import start_worker
from worker_cases import Place, expected_digest

from raydistill.errors import ArtifactError, CorruptArtifact, InvalidValue, MissingArtifact
from raydistill.service.files import Files


@pytest.fixture(scope="module")
def s3():
    """URL of a bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patched:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port = server.get_host_and_port()[1]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("videos-of-tests")
        yield "s3://videos-of-tests"
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def files(request, tmp_path):
    if request.param == "folder":
        return Files(str(tmp_path / "artifacts"))
    return Files(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def test_what_was_written_comes_back_whole_and_in_parts(files):
    data = bytes(range(256)) * 5000
    entry = files.write("videos/a/1/video.mp4", data)
    assert (entry["bytes"], files.read(entry)) == (len(data), data)
    for start, end in ((0, 1), (100, 700000), (len(data) - 3, len(data))):
        assert b"".join(files.chunks(entry["file"], start, end)) == data[start:end]
    assert files.folders("videos") == ["a"]
    with pytest.raises(CorruptArtifact):
        files.read({**entry, "sha256": "0"})
    files.remove("videos/a")
    files.remove("videos/a")
    assert files.folders("videos") == []
    with pytest.raises(MissingArtifact, match=r"video\.mp4"):
        files.read(entry)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b"])
def test_no_name_leads_out(files, name):
    with pytest.raises(ArtifactError, match="no name below"):
        files.write(name, b"x")
    with pytest.raises(ArtifactError, match="no name below"):
        files.remove(name)


def test_unknown_storage_is_refused():
    with pytest.raises(InvalidValue, match="fsspec URL"):
        Files("nosuch://bucket/x")


def test_a_folder_signs_no_urls_and_s3_does(s3, tmp_path):
    with pytest.raises(ArtifactError, match="redirect: false"):
        Files(str(tmp_path)).signed("a")
    files = Files(f"{s3}/signed")
    files.write("a", b"hello")
    with contextlib.closing(urllib.request.urlopen(files.signed("a"))) as answer:
        assert answer.read() == b"hello"


def test_a_video_whose_states_and_files_are_in_s3_is_the_same(s3, tmp_path):
    bundle = save_untrained_bundle(tmp_path)
    place = Place(tmp_path, bundle, artifacts=f"{s3}/{uuid.uuid4().hex}")
    worker = start_worker(place.config)
    job = place.wait(place.ask(plan="4"))
    worker.stop()
    assert job.result["latents_sha256"] == expected_digest(bundle, "4")
    assert place.files.read(job.result["video"])[4:8] == b"ftyp"
    assert place.files.folders("work") == []
