"""The load generator against a server whose times are known: its figures are compared with the truth."""

import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench_serve_cases import TINY, bench, serving

from raydistill.config.bench_serve import BenchServeConfig, MixConfig
from raydistill.errors import MissingValue, RequestRefused, ServiceError
from raydistill.service.load.figures import all_figures
from raydistill.service.load.plan import arrivals
from raydistill.service.load.report import write_run
from raydistill.service.load.rows import Kill, Run
from raydistill.service.load.run import measure

ROOT = Path(__file__).resolve().parents[2]
SLACK_S = 0.25
"""What sockets and a busy machine may add to a latency, in the median; they can take nothing away."""


def queue_latencies(arrived, service_s):
    """Waiting and service of one server: Lindley's recursion."""
    free, found = 0.0, []
    for at in arrived:
        free = max(free, at) + service_s
        found.append(free - at)
    return np.array(found)


@pytest.mark.parametrize("follow", ["events", "poll", "sync"])
def test_latencies_are_those_of_the_queue(follow):
    rate, service_s, count = 12.0, 0.07, 16
    with serving(service_s=lambda fields: service_s) as server:
        config, run = bench(server, rates=(rate,), requests=count, follow=follow, poll_s=0.04)
    rows = run.records[0].rows
    truth = queue_latencies(arrivals(0, rate, count), service_s)
    assert truth.max() > 2 * service_s  # there was a queue
    late = np.array([row.latency_s for row in rows]) - truth
    assert late.min() > -0.002
    assert np.median([row.stages()["rest"] for row in rows]) < SLACK_S
    figures = all_figures(run, config)["phases"][0]
    assert figures["stages_s"]["denoise"] == pytest.approx(
        {"sync": 1.0}.get(follow, 0.7) * service_s, rel=0.01
    )
    assert sum(figures["stages_s"].values()) == pytest.approx(figures["latency_s"]["mean"])
    assert figures["queue_s"]["mean"] == pytest.approx(np.mean(truth - service_s), abs=SLACK_S)
    assert figures["offered_per_s"] == pytest.approx(rate)
    assert figures["accounting"]["completed"] == server.posts == count


def test_previews_and_polls_are_seen():
    with serving(service_s=lambda fields: 0.2) as server:
        _, run = bench(server, rates=(2.0,), requests=2)
        _, polled = bench(server, rates=(2.0,), requests=1, follow="poll", poll_s=0.05)
    for row in run.records[0].rows:
        assert 0.1 <= row.preview_after_s < row.latency_s
    row = polled.records[0].rows[0]
    assert row.preview_s is None
    assert 2 <= row.polls <= 6


def test_a_frozen_server_is_charged_from_the_intended_arrivals():
    """Arrivals go on while it stands still: each has waited for what was left of the freeze."""
    freeze, rate = 0.6, 20.0
    with serving(service_s=lambda fields: 0.0, servers=50, freeze={2: freeze}) as server:
        _, run = bench(server, rates=(rate,), requests=20)
    rows, times = run.records[0].rows, arrivals(0, rate, 20)
    thaw = times[2] + freeze
    held = [n for n, at in enumerate(times) if times[2] + 0.1 < at < thaw - 0.05]
    assert len(held) >= 5
    for n in held:
        assert rows[n].latency_s >= thaw - times[n] - 0.01
        assert rows[n].lag_s < SLACK_S


def test_what_this_program_is_late_is_charged_too():
    """The clock of a latency begins at the intended arrival, not when the request got away."""
    stalls = iter([0.0, 0.5])

    def stall(record):
        time.sleep(next(stalls, 0.0))

    with serving(service_s=lambda fields: 0.0, servers=50) as server:
        _, run = bench(server, stall, rates=(10.0,), requests=12)
    late = [row for row in run.records[0].rows if row.lag_s > 0.1]
    assert late
    for row in late:
        assert row.latency_s >= row.lag_s
        assert row.latency_s >= row.ended_s - row.sent_s + 0.1


def test_a_closed_loop_measures_the_capacity():
    with serving(service_s=lambda fields: 0.05, servers=2) as server:
        config, run = bench(server, concurrency=(1, 4), utilisations=(0.5,), requests=16)
    figures = all_figures(run, config)
    one, four, opened = figures["phases"]
    assert one["achieved_per_s"] <= 20 < four["achieved_per_s"] <= 40
    assert four["achieved_per_s"] == figures["capacity_per_s"]
    assert opened["rate"] == pytest.approx(0.5 * figures["capacity_per_s"])
    assert one["latency_s"]["p50"] < 0.05 + SLACK_S


def test_429_is_shed_and_not_an_error():
    with serving(service_s=lambda fields: 0.3, most_waiting=1, refused=frozenset({1})) as server:
        config, run = bench(server, rates=(30.0,), requests=12)
    figures = all_figures(run, config)["phases"][0]
    counts = figures["accounting"]
    assert (counts["errors"], figures["codes"]["errors"]) == (1, {"overloaded": 1})
    assert counts["shed"] == 11 - counts["accepted"] > 2
    assert figures["codes"]["shed"] == {"queue_full": counts["shed"]}
    assert counts["balanced"]
    assert server.posts == 12  # none was tried again
    assert figures["goodput_share"] == counts["completed"] / 12


def test_goodput_counts_what_is_in_time():
    service_s, deadline = 0.1, 0.35
    with serving(service_s=lambda fields: service_s) as server:
        config, run = bench(server, rates=(100.0,), requests=10, deadline_s=deadline)
    figures = all_figures(run, config)["phases"][0]
    truth = queue_latencies(arrivals(0, 100.0, 10), service_s)
    assert np.abs(truth - deadline).min() > 0.02
    assert 1 <= figures["goodput_share"] * 10 <= (truth <= deadline).sum() < 10
    good = [row for row in run.records[0].rows if row.latency_s <= deadline]
    span = max(row.ended_s for row in run.records[0].rows)
    assert figures["goodput_per_s"] == pytest.approx(len(good) / span)
    assert figures["achieved_per_s"] == pytest.approx(10 / span)


@pytest.mark.parametrize("follow", ["events", "poll"])
def test_a_lost_job_is_listed_as_unfinished(follow):
    script = {"lost": frozenset({1}), "failed": frozenset({2}), "cancelled": frozenset({3}), "servers": 9}
    with serving(**script) as server:
        config, run = bench(server, rates=(50.0,), requests=6, follow=follow, timeout_s=2.0)
    counts = all_figures(run, config)["accounting"]
    assert counts["ids"] == {"failed": ["video_2"], "cancelled": ["video_3"], "unfinished": ["video_1"]}
    assert (counts["accepted"], counts["completed"]) == (6, 3)
    assert counts["balanced"]
    assert run.records[0].timed_out
    assert server.cancels == ["video_1"]


def test_an_end_that_nobody_announced_is_no_latency():
    with serving(service_s=lambda fields: 0.8) as server:
        config, run = bench(server, rates=(50.0,), requests=1, follow="poll", poll_s=30.0, timeout_s=1.3)
    counts = all_figures(run, config)["accounting"]
    assert counts["unannounced"] == ["video_0"]
    assert (counts["completed"], counts["unfinished"]) == (1, 0)
    assert run.records[0].rows[0].latency_s is None
    assert not server.cancels


def test_one_id_for_two_requests_is_flagged():
    with serving(same_id=True) as server:
        config, run = bench(server, rates=(50.0,), requests=3)
    counts = all_figures(run, config)["accounting"]
    assert counts["duplicates"] == ["video_same"]
    assert not counts["balanced"]


def test_a_broken_stream_is_taken_up_where_it_ended():
    with serving(broken_streams=2, service_s=lambda fields: 0.1) as server:
        _, run = bench(server, rates=(50.0,), requests=1, poll_s=0.01)
    assert run.records[0].rows[0].outcome == "completed"
    assert server.last_event_ids == ["", "1", "1"]
    assert server.posts == 1


@pytest.mark.parametrize(
    ("script", "code"),
    [({"content": b"<html>not a video"}, "not_mp4"), ({"content_status": 410}, "http_410")],
)
def test_a_video_that_is_none_is_not_counted_as_one(script, code):
    with serving(**script) as server:
        config, run = bench(server, rates=(50.0,), requests=2)
        _, careless = bench(server, rates=(50.0,), requests=2, content=False)
    figures = all_figures(run, config)["phases"][0]
    assert figures["codes"]["content"] == {code: 2}
    assert figures["goodput_share"] == 0
    assert figures["accounting"]["completed"] == 2
    assert all(row.latency_s for row in careless.records[0].rows)


def test_the_ratio_of_two_kinds_has_an_interval():
    def service_s(fields):
        return {"4": 0.02, "teacher50": 0.1}[fields["plan"]]

    with serving(service_s=service_s) as server:
        config, run = bench(server, compare=[{"plan": "4"}, {"plan": "teacher50"}], requests=12)
    found = all_figures(run, config)["compare"]
    assert (found["first"], found["second"]) == ("plan=4", "plan=teacher50")
    assert found["denoise"]["ratio"] == pytest.approx(5.0, rel=0.01)
    assert 1.5 < found["latency"]["low"] <= found["latency"]["ratio"] <= found["latency"]["high"] < 10
    assert found["latency"]["pairs"] == 6
    plans = [job.fields["plan"] for job in server.jobs]
    assert plans == ["4", "teacher50"] * 6
    seeds = [(job.fields["seed"], job.fields["prompt"]) for job in server.jobs]
    assert seeds[::2] == seeds[1::2]


def test_a_cold_start_waits_for_no_sampler():
    with serving(replicas=[2, 1, 0], service_s=lambda fields: 0.3) as server:
        _, run = bench(server, cold_start=True)
    assert 0.3 <= run.cold_start["latency_s"] < 0.3 + 3 * SLACK_S
    assert run.cold_start["waited_s"] >= 1.0
    assert server.posts == 1
    with serving(replicas=[1]) as server:
        _, run = bench(server, cold_start=True, cold_wait_s=0.6)
    assert (run.cold_start["latency_s"], server.posts) == (None, 0)
    with serving() as server, pytest.raises(ServiceError, match="raydistill_replicas"):
        bench(server, cold_start=True)


def worker(process, **changed):
    fields = {"worker_id": "w", "pid": process.pid, "node": platform.node(), "seen_at": time.time()}
    return {**fields, "stages": ["encode", "denoise", "decode"], **changed}


@pytest.fixture
def sleepers():
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_kills_hit_samplers_of_this_machine_alone(sleepers):
    victim, bystander = sleepers
    workers = [
        worker(victim, worker_id="victim"),
        worker(bystander, worker_id="far", node="elsewhere"),
        worker(bystander, worker_id="decoder", stages=["decode"]),
        worker(bystander, worker_id="reused", seen_at=time.time() - 3600),
        worker(bystander, worker_id="self", pid=os.getpid()),
        worker(bystander, worker_id="init", pid=1),
    ]
    with serving(workers=workers, service_s=lambda fields: 0.05) as server:
        config, run = bench(server, rates=(10.0,), requests=12, kills=2, kill_every_s=0.3)
    assert victim.wait(5) == -signal.SIGKILL
    assert bystander.poll() is None
    first, second = all_figures(run, config)["phases"][0]["kills"]
    assert (first["worker_id"], first["pid"]) == ("victim", victim.pid)
    assert first["at_s"] == pytest.approx(0.3, abs=SLACK_S)
    assert 0 < first["next_completion_s"] < 1
    assert second["pid"] is None
    assert "far is on elsewhere" in second["why_not"]
    with (
        serving(workers=workers[1:]) as server,
        pytest.raises(ServiceError, match="no sampler process to kill"),
    ):
        bench(server, rates=(10.0,), requests=1, kills=1, kill_every_s=0.1)


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    with serving(key="sk-secret") as server:
        with pytest.raises(RequestRefused, match="invalid_api_key"):
            bench(server, rates=(50.0,), requests=1)
        with pytest.raises(MissingValue, match="RAYDISTILL_TEST_KEY"):
            bench(server, rates=(50.0,), requests=1, api_key_env="RAYDISTILL_TEST_KEY")
        monkeypatch.setenv("RAYDISTILL_TEST_KEY", "sk-secret")
        settings = {"api_key_env": "RAYDISTILL_TEST_KEY", "output": str(tmp_path)}
        config, run = bench(server, rates=(50.0,), requests=2, **settings)
    assert run.records[0].counts()["completed"] == 2
    write_run(config, run)
    assert b"sk-secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_results_can_be_read_and_plots_are_there(tmp_path):
    (tmp_path / "timeline.png").write_bytes(b"of an earlier run")
    kinds = [MixConfig(fields={"plan": "4"}), MixConfig(fields={"plan": "8"})]
    with serving() as server:
        settings = {
            "mix": kinds,
            "warmup": 1,
            "output": str(tmp_path),
            "compare": [{"plan": "1"}, {"plan": "2"}],
        }
        config, run = bench(server, concurrency=(1, 2), utilisations=(0.5,), requests=6, **settings)
    run.records[-1].kills.append(Kill(at_s=0.1, worker_id="w", pid=7))
    write_run(config, run)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["schema_version"], results["finished"]) == (1, True)
    assert [one["mode"] for one in results["phases"]] == ["closed", "closed", "compare", "open"]
    assert results["settings"]["mix"][0] == {"weight": 1.0, "fields": {"plan": "4"}}
    assert results["models"] == [{"id": "tiny", "object": "model"}]
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 6 + 4 == results["accounting"]["completed"]
    assert {row["outcome"] for row in rows} == {"completed"}
    for name in ("latency", "throughput", "stages", "timeline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert "Unfinished" not in report
    assert "28 completed + 0 failed + 0 cancelled + 0 unfinished" in report
    assert "| w (7) |" in report


def test_an_empty_run_is_written_too(tmp_path):
    config = BenchServeConfig(**{**TINY, "rates": (5.0,), "output": str(tmp_path)})
    results = write_run(config, Run())
    assert results["phases"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "requests.jsonl", "results.json"]


def test_no_server_is_said_in_one_line():
    config = BenchServeConfig(**{**TINY, "rates": (5.0,), "base_url": "http://127.0.0.1:1", "ready_s": 0.1})
    with pytest.raises(ServiceError, match="no server that answers"):
        asyncio.run(measure(config, Run()))


def test_ctrl_c_writes_what_there_is(tmp_path):
    words = [
        "rates=[20]",
        "requests=1000",
        "concurrency=[]",
        "utilisations=[]",
        "warmup=0",
        f"output={tmp_path}",
    ]
    with serving() as server:
        command = [sys.executable, str(ROOT / "jobs" / "bench_serve.py"), f"base_url={server.url}", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(300):
            if server.posts >= 5:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "unfinished" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["finished"]
    counts = results["accounting"]
    assert counts["completed"] >= 2
    assert counts["not_sent"] > 900
    assert counts["balanced"]
    assert "Unfinished" in (tmp_path / "report.md").read_text()
