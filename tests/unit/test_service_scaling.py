"""How many replicas the queue asks for, and that the controller is never kept waiting."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies
from store_cases import Store, finish, new_job

from raydistill.service.scaling import ByRemainingCost, replicas_for
from raydistill.service.store import Load


def load(queued=0, running=0, remaining=0.0, **by_stage):
    return Load(queued, running, remaining, 0, 0.0, by_stage)


@given(
    queued=strategies.integers(0, 50),
    running=strategies.integers(0, 5),
    cost=strategies.floats(0, 1e4),
    more=strategies.floats(0, 1e4),
    speed=strategies.floats(0, 100),
    drain_s=strategies.floats(0.1, 1000),
)
def test_replicas_end_the_work_in_time_and_none_stands_idle(queued, running, cost, more, speed, drain_s):
    wanted = replicas_for(load(queued, running, cost), speed, drain_s)
    assert (wanted == 0) == (queued + running == 0)
    if wanted:
        assert cost * speed / wanted <= drain_s * (1 + 1e-9)
        assert wanted == 1 or cost * speed / (wanted - 1) > drain_s * (1 - 1e-9)
        assert replicas_for(load(queued, running, cost + more), speed, drain_s) >= wanted


def test_a_pool_of_one_stage_is_woken_before_its_work_arrives():
    upstream = load(queued=3, remaining=30.0, encode=30.0)
    assert replicas_for(upstream, 1.0, 10.0, "encode") == 3
    assert replicas_for(upstream, 1.0, 10.0, "decode") == 1
    assert replicas_for(load(), 1.0, 10.0, "decode") == 0


def wait_for(policy, wanted, context):
    deadline = time.monotonic() + 10
    while policy(context)[0] != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_policy_follows_the_store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/jobs.sqlite")
    jobs, worker = store.jobs(), store.worker("a")
    policy = ByRemainingCost(store.url, drain_s=0.4)
    context = SimpleNamespace(target_num_replicas=5)
    wait_for(policy, 0, context)
    jobs.create(new_job(cost=20.0))
    wait_for(policy, 1, context)  # nothing measured yet
    finish(worker)  # 0.1 s of work for a cost of 20: 1 s for ten more
    for _ in range(10):
        jobs.create(new_job(cost=20.0))
    wait_for(policy, 3, context)
    for job in jobs.page(None, 20, "asc", None)[0][1:]:
        jobs.cancel(job.id, None)
    wait_for(policy, 0, context)


def test_while_the_store_is_silent_the_number_stays(tmp_path):
    policy = ByRemainingCost("postgresql+psycopg://me@127.0.0.1:1/none", stale_s=0.1)
    began = time.monotonic()
    assert policy(SimpleNamespace(target_num_replicas=5)) == (5, {})
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("value", ["env:NO_SUCH_STORE"])
def test_a_store_named_by_an_environment_variable(value, tmp_path, monkeypatch):
    policy = ByRemainingCost(value)
    context = SimpleNamespace(target_num_replicas=2)
    assert policy(context)[0] == 2
    monkeypatch.setenv("NO_SUCH_STORE", Store(f"sqlite:///{tmp_path}/jobs.sqlite").url)
    wait_for(policy, 0, context)
