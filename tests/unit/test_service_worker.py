"""Workers over real small networks: the same bytes whoever works, dies, or takes over."""

import base64
import io
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from bundle_cases import save_untrained_bundle
from PIL import Image
from service_cases import start_worker
from sqlalchemy import select
from store_cases import new_database, postgres
from worker_cases import Place, expected_digest

from raydistill.errors import ArtifactError
from raydistill.service import video
from raydistill.service.bundle import read_bundle
from raydistill.service.files import Files
from raydistill.service.tables import TOTALS, open_database
from raydistill.service.upkeep import Janitor
from raydistill.service.worker import Worker

TAIL = "2+tail"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"), teacher_steps=[3])


@pytest.fixture
def place(tmp_path, bundle):
    return Place(tmp_path, bundle)


@pytest.mark.parametrize("plan", ["1", "4", TAIL, "teacher3"])
def test_a_video_is_what_the_bare_sampler_makes(place, bundle, plan):
    worker = start_worker(place.config)
    job = place.wait(place.ask(plan=plan))
    worker.stop()
    assert job.result["latents_sha256"] == expected_digest(bundle, plan)
    steps = read_bundle(bundle).plans[plan].num_steps
    assert place.steps_taken(job.id) == list(range(1, steps + 1))
    assert job.timings["passes"] == read_bundle(bundle).plans[plan].passes
    with av.open(io.BytesIO(place.files.read(job.result["video"]))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
        assert job.bundle in container.metadata["comment"]
    assert np.stack(frames).shape == (16, 32, 32, 3)
    assert place.files.folders("work") == []


def die_at(config, step: int) -> None:
    """Work until this step begins, then die as by SIGKILL; runs in a process of its own."""
    place = Worker(open_database(config.store), Files(config.artifacts), config.worker, config.keep, STAGES)
    place.hold(config.bundle_table())
    for engine in place.engines.values():
        take = engine.step

        def fatal(request, i, x, text, take=take):
            if i == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(request, i, x, text)

        engine.step = fatal
    place.start()
    threading.Event().wait(60)


STAGES = ("encode", "denoise", "decode")


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_killed_workers_video_is_finished_by_another_with_the_same_bytes(place, bundle, step):
    job = place.ask(plan=TAIL)
    child = multiprocessing.get_context("fork").Process(target=die_at, args=(place.config, step))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert place.store.get(job, None).state == "running"
    worker = start_worker(place.config)
    done = place.wait(job)
    worker.stop()
    assert (done.state, done.attempt) == ("completed", 2)
    assert done.result["latents_sha256"] == expected_digest(bundle, TAIL)
    assert place.steps_taken(job) == list(range(1, done.num_steps + 1))  # no step was taken twice


def test_a_worker_that_is_told_to_stop_gives_its_job_back_within_a_step(tmp_path, bundle):
    place = Place(tmp_path, bundle, worker={"checkpoint_every_s": 60})  # nothing was saved before
    job = place.ask(plan=TAIL)
    first = place.worker()
    (engine,) = first.engines.values()
    take = engine.step

    def stopping(request, i, x, text):
        if i == 3:
            first.stopping.set()  # in the middle of the step
        return take(request, i, x, text)

    engine.step = stopping
    first.start()
    place.wait(job, until=lambda job: job.step == 4 and job.owner is None)
    first.stop()
    assert place.store.get(job, None).saved["step"] == 4
    assert place.store.workers() == []
    second = start_worker(place.config)
    done = place.wait(job)
    second.stop()
    assert done.result["latents_sha256"] == expected_digest(bundle, TAIL)
    assert place.steps_taken(job) == list(range(1, done.num_steps + 1))
    assert done.strikes == 0


def test_stages_in_pools_of_their_own_make_the_same_video(place, bundle):
    pools = [start_worker(place.config, (stage,)) for stage in STAGES]
    done = place.wait(place.ask(plan="4"))
    for pool in pools:
        pool.stop()
    assert done.result["latents_sha256"] == expected_digest(bundle, "4")


def test_on_postgres_the_video_is_the_same(tmp_path, bundle):
    with postgres() as server:
        place = Place(tmp_path, bundle, store=new_database(server))
        workers = [start_worker(place.config) for _ in range(2)]
        jobs = [place.ask(plan="4") for _ in range(6)]
        done = [place.wait(job) for job in jobs]
        for worker in workers:
            worker.stop()
        place.database.engine.dispose()
    assert {job.result["latents_sha256"] for job in done} == {expected_digest(bundle, "4")}
    assert {job.attempt for job in done} == {1}


def test_a_cancelled_video_costs_at_most_one_more_step(place):
    job = place.ask(plan=TAIL)
    worker = place.worker()
    (engine,) = worker.engines.values()
    take, taken = engine.step, []

    def cancelled(request, i, x, text):
        taken.append(i)
        if i == 2:
            place.store.cancel(job, None)
        return take(request, i, x, text)

    engine.step = cancelled
    worker.start()
    other = place.ask(plan="1")
    assert place.wait(other).state == "completed"  # the worker is free again
    worker.stop()
    assert taken[:-1] == [0, 1, 2]
    assert place.store.get(job, None).state == "cancelled"
    Janitor(place.database, place.files, place.config.keep, 1.0).round(place.catalog.labels)
    assert place.files.folders("work") == []


def test_what_would_fail_again_fails_once(place):
    worker = place.worker()
    (engine,) = worker.engines.values()
    engine.step = lambda request, i, x, text: (x * float("nan"), x)
    worker.start()
    job = place.wait(place.ask())
    worker.stop()
    assert (job.state, job.error_code, job.attempt) == ("failed", "generation_failed", 1)
    assert "NaN" in job.error_message


def test_memory_that_another_stage_had_is_waited_for_once(place):
    worker = place.worker()
    (engine,) = worker.engines.values()

    def too_large(request, i, x, text):
        raise MemoryError

    engine.step = too_large
    worker.start()
    job = place.wait(place.ask())
    worker.stop()
    assert (job.state, job.error_code, job.attempt) == ("failed", "out_of_memory", 2)


def test_a_worker_that_hangs_in_a_stage_is_not_well(tmp_path, bundle):
    place = Place(tmp_path, bundle, worker={"stage_timeout_s": 0.2})
    worker, goes_on = place.worker(), threading.Event()
    (engine,) = worker.engines.values()
    take = engine.step
    engine.step = lambda *given: (goes_on.wait(10), take(*given))[1]
    worker.start()
    assert worker.alive()
    place.ask()
    deadline = time.monotonic() + 10
    while worker.alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    goes_on.set()
    worker.stop()


def test_storage_that_is_away_for_a_while_costs_no_video(tmp_path, bundle):
    place = Place(tmp_path, bundle, worker={"retry_after_s": 0.05, "strikes": 2})
    root = Path(place.config.artifacts)
    root.write_text("a file where the folder was")
    worker = start_worker(place.config)
    job = place.ask()
    place.wait(job, until=lambda job: job.attempt > 3)
    root.unlink()
    done = place.wait(job)
    worker.stop()
    assert done.state == "completed"
    assert done.strikes == 0


def test_a_damaged_state_is_never_decoded(tmp_path, bundle):
    place = Place(tmp_path, bundle, worker={"strikes": 2})
    job = place.ask()
    upstream = start_worker(place.config, ("encode", "denoise"))
    place.wait(job, until=lambda job: job.stage == "decode")
    upstream.stop()
    (clean,) = Path(place.config.artifacts).glob("work/*/*-clean.safetensors")
    damaged = bytearray(clean.read_bytes())
    damaged[-1] ^= 1
    clean.write_bytes(damaged)
    decoder = start_worker(place.config, ("decode",))
    done = place.wait(job)
    decoder.stop()
    assert (done.state, done.error_code) == ("failed", "internal_error")


@pytest.mark.parametrize(("every_s", "saved"), [(0.0, [1, 2, 3]), (60.0, [])])
def test_the_state_is_saved_as_often_as_the_settings_say(tmp_path, bundle, every_s, saved):
    place = Place(tmp_path, bundle, worker={"checkpoint_every_s": every_s})
    worker = start_worker(place.config, ("encode", "denoise"))
    job = place.ask(plan="4")
    place.wait(job, until=lambda job: job.stage == "decode")
    worker.stop()
    names = [path.stem.partition("-")[2] for path in Path(place.config.artifacts).glob("work/*/*")]
    assert sorted(names) == sorted([*map(str, saved), "clean", "text"])


def test_a_new_version_is_loaded_beside_the_old_one(tmp_path, bundle):
    place = Place(tmp_path, bundle)
    worker = place.worker()
    (old,) = worker.engines.values()
    second = save_untrained_bundle(tmp_path, name="second", seed=3)
    worker.hold({"tiny": str(bundle), "second": str(second)})
    assert old in worker.engines.values()
    assert len(worker.engines) == 2
    worker.hold({"second": str(second)})
    assert [engine.card.name for engine in worker.engines.values()] == ["second"]
    shutil.copytree(bundle, tmp_path / "broken")
    (tmp_path / "broken" / "codec" / "latents.json").write_text("{}")
    worker.hold({"broken": str(tmp_path / "broken"), "second": str(second)})  # what is good is served
    assert [engine.card.name for engine in worker.engines.values()] == ["second"]
    with pytest.raises(ArtifactError, match="no bundle can be served"):
        worker.hold({"x": str(tmp_path / "none")})
    assert [engine.card.name for engine in worker.engines.values()] == ["second"]


def test_a_step_longer_than_the_lease_is_not_lost_to_a_stop(tmp_path, bundle):
    place = Place(tmp_path, bundle, worker={"lease_s": 0.5, "heartbeat_s": 0.1})
    job, first, second = place.ask(plan="4"), place.worker(), place.worker()
    (engine,) = first.engines.values()
    take, renewed = engine.step, []

    def slow(request, i, x, text):
        if i == 1:
            first.stopping.set()
            claimed = place.store.get(job, None).leased_at  # renewed until what the claim gave is over
            last = claimed + 2 * place.config.worker.lease_s
            renewed.append(place.wait(job, until=lambda job: job.lease_until > last, timeout_s=10.0))
        return take(request, i, x, text)

    engine.step = slow
    first.start()
    place.wait(job, until=lambda job: job.owner == first.id and job.step == 1)
    first.stop()
    second.start()
    done = place.wait(job)
    second.stop()
    assert renewed
    assert done.state == "completed"
    assert place.steps_taken(job) == [1, 2, 3, 4]
    with place.database.read() as connection:  # given back, not taken
        assert "takeovers" not in connection.execute(select(TOTALS.c.name)).scalars().all()


def test_another_stores_videos_are_never_removed(tmp_path, bundle):
    ours = Place(tmp_path / "a", bundle, keep={"orphans_s": 0.001})
    janitor = Janitor(ours.database, ours.files, ours.config.keep, 1.0)
    janitor.round(ours.catalog.labels)
    ours.files.write("videos/gone/1/video.mp4", b"x")
    janitor.round(ours.catalog.labels)  # seen for the first time
    assert ours.files.folders("videos") == ["gone"]
    time.sleep(0.01)
    janitor.round(ours.catalog.labels)
    assert ours.files.folders("videos") == []
    other = Place(tmp_path / "b", bundle, artifacts=ours.config.artifacts, keep={"orphans_s": 0.001})
    ours.files.write("videos/mine/1/video.mp4", b"x")
    stranger = Janitor(other.database, other.files, other.config.keep, 1.0)
    for _ in range(2):
        done = stranger.round(other.catalog.labels)
        time.sleep(0.01)
    assert "files of nobody" not in done
    assert ours.files.folders("videos") == ["mine"]


@pytest.mark.parametrize("previews", ["codec", "linear", "off"])
def test_previews_are_small_pictures_of_the_prediction(tmp_path, bundle, previews):
    place = Place(tmp_path, bundle, worker={"previews": previews})
    worker = start_worker(place.config)
    job = place.wait(place.ask(plan="4"))
    worker.stop()
    frames = [data for _, kind, data in place.store.events(job.id, 0) if kind == "video.partial_frame"]
    assert [frame["step"] for frame in frames] == ([] if previews == "off" else [1, 2, 3])
    sizes = {"codec": (32, 32), "linear": (4, 4)}
    for frame in frames:
        with Image.open(io.BytesIO(base64.b64decode(frame["b64_json"]))) as picture:
            assert picture.size == sizes[previews]


@pytest.mark.parametrize("size", [(32, 48), (33, 31)])
def test_encoded_frames_come_back(size):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(*size, 1).astype(np.uint8)
    frames = np.stack([np.roll(ramp, shift, 0).repeat(3, 2) for shift in range(5)])
    with av.open(io.BytesIO(video.mp4(frames, 5, {"seed": 1}))) as container:
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.metadata["comment"] == '{"seed": 1}'
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 12
    with Image.open(io.BytesIO(video.spritesheet(frames))) as sheet:
        assert sheet.size == (3 * size[1], 2 * size[0])
