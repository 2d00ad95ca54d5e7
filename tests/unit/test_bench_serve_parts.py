"""What the load generator draws, reads and computes, and which settings it refuses: no server is needed."""

import numpy as np
import pytest

from raydistill.config.bench_serve import BenchServeConfig, MixConfig
from raydistill.config.load import from_command_line
from raydistill.errors import InvalidValue
from raydistill.service.load.client import Event, EventParser, replicas_in
from raydistill.service.load.figures import distribution, steps_ratio, throughput
from raydistill.service.load.kill import after_kills, why_spared
from raydistill.service.load.plan import Draws, Phase, Request, arrivals, closed_phases, generator
from raydistill.service.load.rows import Kill, Record


def test_intervals_of_percentiles_hold_the_truth():
    config = BenchServeConfig(num_draws=200)
    inside = 0
    for seed in range(40):
        values = generator(seed, "test").exponential(1.0, size=100)
        found = distribution(values.tolist(), config, f"case {seed}")
        assert found["p50_low"] <= found["p50"] <= found["p50_high"]
        inside += found["p50_low"] <= np.log(2) <= found["p50_high"]
    assert 32 <= inside <= 40
    ratio = steps_ratio([1.0] * 9, [3.0] * 9, generator(0, "test"), 50)
    assert (ratio["ratio"], ratio["low"], ratio["high"]) == (3.0, 3.0, 3.0)


def test_arrivals_are_poisson_and_follow_from_the_seed():
    times = np.array(arrivals(3, 5.0, 4000))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)
    assert 0 < times[0] < times[-1] < 4000 / 5.0
    assert arrivals(3, 5.0, 10) == arrivals(3, 5.0, 10) != arrivals(4, 5.0, 10)
    assert np.allclose(arrivals(3, 10.0, 4000), times / 2)


def test_the_mix_follows_its_weights_and_seeds_their_numbers():
    kinds = [
        MixConfig(weight=3, fields={"plan": "4"}),
        MixConfig(weight=1, fields={"size": "32x32", "seed": 7}),
    ]
    config = BenchServeConfig(mix=kinds, concurrency=(1, 2), requests=400, seed=100, prompts=["a", "b"])
    first, second = closed_phases(config, Draws(config))
    requests = [*first.requests, *second.requests]
    plans = [one for one in requests if one.kind == "plan=4"]
    assert 0.7 < len(plans) / 800 < 0.8
    assert all(one.fields["seed"] == 100 + one.number for one in plans)
    assert {one.fields["seed"] for one in requests if one.kind == "size=32x32 seed=7"} == {7}
    assert [one.number for one in requests] == list(range(800))
    assert {one.fields["prompt"] for one in requests} == {"a", "b"}


def test_replicas_are_read_from_prometheus_text():
    assert replicas_in("raydistill_replicas 3\n") == 3
    assert replicas_in('raydistill_replicas{deployment="Sampler",x="sampler"} 2\n') == 2
    assert replicas_in("raydistill_replicas_total 3\n") is None


def record(mode, times, concurrency=2):
    requests = [Request(number=n, kind="default", fields={}) for n in range(len(times))]
    made = Record.of(Phase(name="made", mode=mode, requests=tuple(requests), concurrency=concurrency))
    for row, (sent, ended) in zip(made.rows, times, strict=True):
        row.intended_s = row.sent_s = sent
        row.ended_s, row.outcome = ended, "completed"
    return made


def test_a_closed_loop_is_timed_while_all_its_slots_are_busy():
    times = [(0.0, 1.0), (0.0, 1.0), (1.0, 2.0), (1.0, 2.0), (2.0, 9.0)]
    assert throughput(record("closed", times)) == 4 / 2
    assert throughput(record("open", times)) == 5 / 9
    assert throughput(record("closed", times[:2])) == 2 / 1
    lost = record("open", times)
    lost.rows[0].outcome, lost.seconds = "unfinished", 20.0
    assert throughput(lost) == 4 / 20


def test_an_answer_that_did_not_come_is_an_error_with_a_name():
    cut = record("open", [(0.0, 1.0), (0.5, None)])
    cut.rows[1].outcome = "sent"
    cut.give_up(2.0)
    assert [(row.outcome, row.code) for row in cut.rows] == [("completed", ""), ("error", "no_answer")]


def test_what_follows_a_kill():
    rows = record("open", [(0.2, 0.5), (0.4, 3.0), (0.6, 2.5), (1.5, 2.0), (4.0, None)]).rows
    for row in rows:
        row.accepted_s, row.done_s = row.sent_s, row.ended_s
    rows[4].outcome, rows[1].attempt = "unfinished", 2
    first, second = after_kills([Kill(at_s=1.0, pid=7), Kill(at_s=5.0, pid=8)], rows)
    assert (first["next_completion_s"], first["under_way"], first["all_done_s"]) == (1.0, 2, 2.0)
    assert first["restarted"] == 1
    assert (second["next_completion_s"], second["under_way"], second["all_done_s"]) == (None, 1, None)


def test_only_workers_of_the_stage_are_killed():
    assert why_spared({"pid": 7}, "denoise") == "does not run denoise"


def test_events_come_whole_however_they_are_cut():
    text = b': hello\r\n\r\nid: 7\r\nevent: video.queued\r\ndata: {"position":\r\ndata: 2}\r\n\r\n'
    text += b'data: {"type": "video.failed"}\n\n'
    parser = EventParser()
    events = [event for n in range(len(text)) for event in parser.feed(text[n : n + 1])]
    expected = [Event("video.queued", {"position": 2}, "7"), Event("video.failed", {"type": "video.failed"})]
    assert events == expected == EventParser().feed(text)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("base_url", {"base_url": "ftp://127.0.0.1"}),
        ("base_url", {"base_url": "http://user:secret@127.0.0.1"}),
        ("base_url", {"base_url": "http://"}),
        ("base_url", {"base_url": "http://10.1.2.3:8000", "kills": 1, "kill_every_s": 1.0}),
        ("base_url", {"base_url": "http://localhost.example", "kills": 1, "kill_every_s": 1.0}),
        ("kills", {"kills": 3}),
        ("kills", {"kills": 10, "kill_every_s": 100.0}),
        (
            "kills",
            {"kills": 1, "kill_every_s": 1.0, "concurrency": (), "utilisations": (), "cold_start": True},
        ),
        ("requests", {"requests": 0}),
        ("timeout_s", {"timeout_s": float("inf")}),
        ("rates", {"rates": (0.0,)}),
        ("utilisations", {"utilisations": (0.5, 0.5)}),
        ("concurrency", {"concurrency": (0,)}),
        ("concurrency", {"concurrency": (), "utilisations": ()}),
        ("compare", {"compare": [{"plan": "4"}]}),
        ("compare", {"compare": [{"plan": "4"}, {"plan": "4"}]}),
        ("mix", {"mix": [MixConfig(weight=0.0)]}),
        ("deadline_s", {"deadline_s": float("nan")}),
        ("prompts", {"prompts": [" "]}),
        ("api_key_env", {"api_key_env": "$KEY"}),
    ],
)
def test_settings_out_of_range_are_refused(key, values):
    with pytest.raises(InvalidValue) as refused:
        BenchServeConfig(**values)
    assert refused.value.key == key


def test_settings_are_read_from_the_command_line():
    words = [
        'compare=[{plan: "4"}, {plan: teacher50}]',
        "mix=[{weight: 2, fields: {size: 32x32}}]",
        "rates=[1]",
    ]
    config, _ = from_command_line(BenchServeConfig, words)
    assert config.compare == [{"plan": "4"}, {"plan": "teacher50"}]
    assert config.kinds == [(2.0, {"size": "32x32"})]
