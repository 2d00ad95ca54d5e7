"""The server on Ray Serve: replicas that die, scale, stop and change, and clients that misbehave."""

import collections
import socket
import threading
import time

import numpy as np
import pytest
import sqlalchemy as sa
from bundle_cases import conformance_bundles, save_untrained_bundle
from conformance import CONFORMANCE
from serve_cases import Killer, deployment, served

from raydistill.service.tables import EVENTS, open_database

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]
TAIL = "2+tail"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    bundles = conformance_bundles(folder, save_untrained_bundle(folder, name="first"))
    save_untrained_bundle(folder, name="second", seed=3)
    with served(folder, bundles) as running:
        yield running


def ends(server) -> collections.Counter:
    """How often the store's journal says that each job has ended."""
    database = open_database(server.config["applications"][0]["args"]["store"])
    with database.read() as connection:
        over = EVENTS.c.kind.in_(("video.completed", "video.failed"))
        counted = collections.Counter(connection.execute(sa.select(EVENTS.c.job).where(over)).scalars())
    database.engine.dispose()
    return counted


def test_from_no_replica_to_a_video_and_back(server):
    assert server.workers() == []
    job = server.wait(server.create(seed=5))
    assert job["status"] == "completed"
    status, headers, body = server.ask(f"/v1/videos/{job['id']}/content")
    assert (status, body[4:8]) == (200, b"ftyp")
    assert len(headers.get_all("x-request-id")) == 1
    server.wait_for_workers(lambda workers: not workers)
    again = server.wait(server.create(seed=5))
    assert again["x_raydistill"]["latents_sha256"] == job["x_raydistill"]["latents_sha256"]


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.parametrize("check", CONFORMANCE, ids=lambda check: check.__name__)
def test_clients_may_rely_on_it(server, check):
    check(server)


def test_more_work_brings_more_replicas(server):
    jobs = [server.create(plan=TAIL, seed=i) for i in range(60)]
    server.wait_for_workers(lambda workers: len(workers) == 2)
    assert {server.wait(job)["status"] for job in jobs} == {"completed"}


def test_ten_killed_replicas_cost_no_video_and_make_none_twice(server):
    undisturbed = {
        seed: server.wait(server.create(plan=TAIL, seed=seed))["x_raydistill"]["latents_sha256"]
        for seed in range(3)
    }
    killer, jobs, cancelled = Killer(server, 10), [], []
    while killer.thread.is_alive():
        if sum(server.show(job)["status"] in ("queued", "in_progress") for job in jobs[-12:]) < 10:
            jobs.append(server.create(plan=TAIL, seed=len(jobs) % 3))
            if len(jobs) % 7 == 0:
                server.ask(f"/v1/videos/{jobs[-1]}/cancel", {})
                cancelled.append(jobs[-1])
        time.sleep(0.1)
    assert len(killer.killed) == len(set(killer.killed)) == 10
    shown = {job: server.wait(job, timeout_s=180) for job in jobs}
    completed = {job for job, one in shown.items() if one["status"] == "completed"}
    assert set(jobs) - completed == set(cancelled)
    assert len(completed) >= 10
    for i, job in enumerate(jobs):
        if job in completed:
            assert shown[job]["x_raydistill"]["latents_sha256"] == undisturbed[i % 3]
    assert max(one["x_raydistill"]["attempt"] for one in shown.values()) > 1
    counted = ends(server)
    assert {job: counted[job] for job in jobs} == dict.fromkeys(jobs, 1)
    logged = collections.defaultdict(list)
    for line in server.logged():
        logged[line["happened"]].append(line["job"])
    assert set(jobs) <= set(logged["accepted"])
    published = [job for job in logged["published"] if job in shown]
    assert len(published) == len(set(published))
    assert set(cancelled) <= set(logged["cancelled"])
    # The store's journal is exact. A line of the log may be lost with the process that was about to write it.
    assert len(completed - set(published)) <= len(killer.killed)
    assert not set(logged["failed"]) & set(jobs)


def test_a_canary_takes_its_share_and_is_rolled_back_without_loading_again(server):
    args = server.config["applications"][0]["args"]
    folder = server.folder
    bundles = {"first": args["bundles"]["tiny"], "second": str(folder / "second")}
    scaling = deployment(server.config, "Sampler")["autoscaling_config"]
    scaling["min_replicas"] = 1  # it shall not go for want of work meanwhile
    server.deploy()
    before = {one["pid"] for one in server.wait_for_workers(lambda workers: workers)}

    def told(bundles, weights):
        for name in ("Ingress", "Sampler", "Janitor"):
            deployment(server.config, name)["user_config"] = {"bundles": bundles}
        deployment(server.config, "Ingress")["user_config"]["models"] = {"tiny": weights}
        server.deploy()

    def switch(**weights):
        told(bundles, weights)
        deadline = time.monotonic() + 30
        while list(server.ask("/v1/models")[2]["data"][0]["x_raydistill"]["bundles"].values()) != list(
            weights.values()
        ):
            assert time.monotonic() < deadline
        time.sleep(1.0)  # the other ingress

    def versions(count):
        jobs = [server.wait(server.create(model="tiny", num_inference_steps=1)) for _ in range(count)]
        return collections.Counter(job["x_raydistill"]["bundle"].partition("@")[0] for job in jobs)

    switch(first=0.5, second=0.5)
    made = versions(24)
    assert set(made) == {"first", "second"}
    assert min(made.values()) >= 4
    switch(first=1.0, second=0.0)
    assert versions(12) == {"first": 12}
    damaged = save_untrained_bundle(folder, name="damaged", seed=4)
    with open(damaged / "codec" / "config.json", "a", encoding="utf-8") as config:
        config.write(" ")
    told({**bundles, "damaged": str(damaged)}, {"damaged": 1.0})  # not as it was exported: not taken
    assert versions(6) == {"first": 6}
    switch(first=1.0, second=0.0)
    assert before & {one["pid"] for one in server.workers()}, "the weights were loaded anew"
    scaling["min_replicas"] = 0
    server.deploy()


def test_stalled_connections_do_not_hold_up_honest_ones(server):
    server.wait(server.create())

    def p95(count=60) -> float:
        seconds = []
        for _ in range(count):
            began = time.monotonic()
            assert server.ask("/v1/models")[0] == 200
            seconds.append(time.monotonic() - began)
        return float(np.percentile(seconds, 95))

    def stall(halfway: bytes) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", server.port))
        one.sendall(halfway)
        return one

    head = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    p95()
    undisturbed = p95()
    stalled = [stall(head) for _ in range(100)]
    stalled += [stall(head + b'Content-Length: 500\r\n\r\n{"prompt": ') for _ in range(100)]
    began = time.monotonic()
    disturbed = p95()
    held = time.monotonic() - began
    assert disturbed <= 2 * undisturbed + 0.05, (undisturbed, disturbed, held)
    stalled[-1].settimeout(15)
    assert b"408" in stalled[-1].recv(4096).splitlines()[0]
    for one in stalled:
        one.close()


def test_too_large_a_body_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n\r\n")
        one.settimeout(15)
        assert b"413" in one.recv(4096).splitlines()[0]


def test_a_client_that_hangs_up_cancels_its_synchronous_video(server):
    busy = [server.create(plan=TAIL) for _ in range(10)]
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        body = b'{"prompt": "gone", "plan": "2+tail"}'
        one.sendall(
            b"POST /v1/videos/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        time.sleep(1.0)
    deadline = time.monotonic() + 30
    while True:
        found = [one for one in server.ask("/v1/videos?limit=100")[2]["data"] if one["prompt"] == "gone"]
        if found and found[0]["error"] == {"code": "cancelled", "message": "the request was cancelled"}:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    for job in busy:
        server.ask(f"/v1/videos/{job}", method="DELETE")


def test_a_restart_of_everything_keeps_the_queue(server, tmp_path_factory):
    """Another head, another Serve, stages in pools of their own: what was accepted before is made."""
    threads = [threading.Thread(target=server.create, kwargs={"plan": TAIL, "seed": 1}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = server.ask("/v1/videos?limit=8")[2]["data"]
    assert {one["status"] for one in listed} & {"queued", "in_progress"}
    server._serve("shutdown", "-y")
    bundles = {"first": str(server.folder / "first"), "second": str(server.folder / "second")}
    with served(server.folder, bundles, pipeline="staged") as anew:
        done = [anew.wait(one["id"]) for one in listed]
        assert {one["status"] for one in done} == {"completed"}
        assert len({one["x_raydistill"]["latents_sha256"] for one in done}) == 1
        counted = ends(anew)
        assert all(counted[one["id"]] == 1 for one in listed)
