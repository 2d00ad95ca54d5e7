"""The job store, on SQLite and Postgres alike: nothing accepted is lost, nothing is published twice."""

import threading
from functools import partial

import pytest
import sqlalchemy as sa
from store_cases import BUNDLE, SAVED, Store, finish, new_database, new_job, postgres, publish

from raydistill.errors import InvalidValue, LeaseLost, RequestRefused
from raydistill.service.store import Quota
from raydistill.service.tables import JOBS, open_database


@pytest.fixture(scope="module")
def server():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    is_sqlite = request.param == "sqlite"
    url = (
        f"sqlite:///{tmp_path}/jobs.sqlite" if is_sqlite else new_database(request.getfixturevalue("server"))
    )
    store = Store(url)
    yield store
    store.database.engine.dispose()


def at_once(count, call):
    """Call from so many threads at the same moment; returns results and refusals."""
    barrier, out = threading.Barrier(count), []

    def run(i):
        barrier.wait()
        try:
            out.append(call(i))
        except (RequestRefused, LeaseLost) as refused:
            out.append(refused)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_a_job_goes_through_its_stages_and_is_published_once(store):
    jobs, worker = store.jobs(), store.worker("a")
    made = jobs.create(new_job())
    assert made.state == "queued"
    assert finish(worker) == made.id
    job = jobs.get(made.id, None)
    assert (job.state, job.step, job.attempt, job.strikes, job.remaining) == ("completed", 4, 1, 0, 0.0)
    assert job.result == {"latents_sha256": "0"}
    assert job.started_at >= job.created_at
    assert job.completed_at >= job.started_at
    assert job.expires_at == pytest.approx(job.completed_at + 60, abs=1)
    assert store.told(made.id) == ["video.queued", *["video.in_progress"] * 3, "video.completed"]
    assert worker.claim("encode", [BUNDLE]) is None


def test_many_claimers_take_each_job_once(store):
    jobs = store.jobs()
    made = {jobs.create(new_job()).id for _ in range(12)}
    workers = [store.worker(f"w{i}", encode_ahead=100) for i in range(6)]
    leases = at_once(6, lambda i: [workers[i].claim("encode", [BUNDLE]) for _ in range(4)])
    taken = [lease.job.id for several in leases for lease in several if lease is not None]
    assert sorted(taken) == sorted(made)


def test_jobs_are_taken_in_the_order_in_which_they_came(store):
    jobs, worker = store.jobs(), store.worker("a")
    made = [jobs.create(new_job()).id for _ in range(3)]
    assert [finish(worker) for _ in made] == made


def test_a_bundle_that_a_worker_does_not_hold_is_left_to_others(store):
    jobs = store.jobs()
    jobs.create(new_job(bundle="other@1"))
    assert store.worker("a").claim("encode", [BUNDLE]) is None
    assert store.worker("b").claim("encode", ["other@1"]) is not None


def test_a_silent_holder_loses_the_job_and_can_write_nothing_more(store):
    jobs, first, second = store.jobs(), store.worker("a"), store.worker("b")
    made = jobs.create(new_job())
    old = first.claim("encode", [BUNDLE])
    assert second.claim("encode", [BUNDLE]) is None
    store.silence()
    new = second.claim("encode", [BUNDLE])
    assert (new.job.id, new.job.attempt, new.job.strikes) == (made.id, 2, 1)
    for write in (
        lambda: first.progress(old, step=1, expert="semantic", timings={}),
        lambda: first.keep(old, SAVED, {}),
        lambda: first.advance(old, "denoise", saved=SAVED, timings={}, seconds=0.0),
        lambda: publish(first, old),
        lambda: first.fail(old, "internal_error", "late"),
        lambda: first.release(old),
    ):
        with pytest.raises(LeaseLost):
            write()
    first.heartbeat()  # renews what it holds: nothing
    second.advance(new, "denoise", saved=SAVED, timings={}, seconds=0.1)
    assert jobs.get(made.id, None).strikes == 0
    assert store.told(made.id) == ["video.queued", "video.in_progress"]


def test_a_heartbeat_renews_leases_but_not_those_of_a_hung_stage(store):
    jobs, first, second = store.jobs(), store.worker("a"), store.worker("b")
    jobs.create(new_job())
    first.claim("encode", [BUNDLE])
    store.silence()
    first.heartbeat()
    assert second.claim("encode", [BUNDLE]) is None
    store.silence(leased_at=0.0)  # at it for longer than any stage may take
    first.heartbeat()
    assert second.claim("encode", [BUNDLE]) is not None


def test_what_nobody_works_on_is_not_renewed(store):
    """A worker whose claim or write went through while its answer was lost."""
    jobs, first, second = store.jobs(), store.worker("a"), store.worker("b")
    jobs.create(new_job())
    first.done(first.claim("encode", [BUNDLE]))
    store.silence()
    first.heartbeat()
    assert second.claim("encode", [BUNDLE]) is not None


def test_a_worker_that_was_taken_off_the_list_comes_back(store):
    worker = store.worker("a")
    worker.leave()
    assert store.jobs().workers() == []
    worker.heartbeat()
    (row,) = store.jobs().workers()
    assert (row["id"], row["bundles"]) == ("a", [BUNDLE])


def test_a_request_that_was_cancelled_can_be_sent_again(store):
    jobs = store.jobs()
    first = jobs.create(new_job(request_hash="same"), key="k")
    jobs.cancel(first.id, None)
    again = jobs.create(new_job(request_hash="same"), key="k")
    assert again.id != first.id
    assert jobs.create(new_job(request_hash="same"), is_retry=True).id == again.id


def test_a_job_that_kills_its_workers_fails_in_the_end(store):
    jobs, worker = store.jobs(), store.worker("a", strikes=3)
    made = jobs.create(new_job())
    for attempt in (1, 2, 3):
        assert worker.claim("encode", [BUNDLE]).job.attempt == attempt
        store.silence()
    assert worker.claim("encode", [BUNDLE]) is None
    job = jobs.get(made.id, None)
    assert (job.state, job.error_code) == ("failed", "internal_error")


def test_getting_on_forgives_strikes(store):
    jobs, worker = store.jobs(), store.worker("a", strikes=2)
    made = jobs.create(new_job())
    lease = worker.claim("encode", [BUNDLE])
    worker.advance(lease, "denoise", saved=SAVED, timings={}, seconds=0.1)
    for step in (1, 2, 3):
        lease = worker.claim("denoise", [BUNDLE])
        worker.progress(lease, step=step, expert="semantic", timings={}, saved={**SAVED, "step": step})
        store.silence()
    job = worker.claim("denoise", [BUNDLE]).job
    assert (job.id, job.saved["step"], job.attempt) == (made.id, 3, 4)


def test_a_job_given_back_waits_and_counts_no_strike_unless_told(store):
    jobs, worker = store.jobs(), store.worker("a", strikes=2)
    made = jobs.create(new_job())
    worker.release(worker.claim("encode", [BUNDLE]))
    worker.release(worker.claim("encode", [BUNDLE]), wait_s=3600.0, strike=True)
    assert worker.claim("encode", [BUNDLE]) is None
    with store.database.write() as connection:
        connection.execute(sa.update(JOBS).values(not_before=0.0))
    worker.release(worker.claim("encode", [BUNDLE]), strike=True)
    assert jobs.get(made.id, None).state == "failed"


def test_only_so_many_texts_are_encoded_ahead(store):
    jobs, worker = store.jobs(), store.worker("a", encode_ahead=2)
    for _ in range(4):
        jobs.create(new_job())
    for _ in range(2):
        worker.advance(worker.claim("encode", [BUNDLE]), "denoise", saved=SAVED, timings={}, seconds=0.0)
    assert worker.claim("encode", [BUNDLE]) is None
    jobs.create(new_job(bundle="other@1"))
    assert worker.claim("encode", ["other@1"]) is not None  # not held up by what it cannot denoise
    assert worker.claim("denoise", [BUNDLE]) is not None
    assert worker.claim("encode", [BUNDLE]) is not None


def test_a_cancelled_job_ends_at_once_and_its_worker_learns_it(store):
    jobs, worker = store.jobs(), store.worker("a")
    waiting, running = jobs.create(new_job()), jobs.create(new_job())
    assert jobs.cancel(waiting.id, None).state == "cancelled"
    assert jobs.cancel(waiting.id, None).state == "cancelled"  # twice is once
    lease = worker.claim("encode", [BUNDLE])
    assert lease.job.id == running.id
    jobs.cancel(running.id, None)
    with pytest.raises(LeaseLost):
        worker.advance(lease, "denoise", saved=SAVED, timings={}, seconds=0.1)
    assert store.totals()["jobs_cancelled"] == 2
    done = jobs.create(new_job())
    finish(worker)
    with pytest.raises(RequestRefused, match="409 video_not_cancellable"):
        jobs.cancel(done.id, None)


def test_a_deleted_job_is_gone_and_counted(store):
    jobs, worker = store.jobs(), store.worker("a")
    made = jobs.create(new_job())
    lease = worker.claim("encode", [BUNDLE])
    jobs.delete(made.id, None)
    for call in (jobs.get, jobs.delete, jobs.cancel):
        with pytest.raises(RequestRefused, match="404 video_not_found"):
            call(made.id, None)
    with pytest.raises(LeaseLost):
        publish(worker, lease)
    assert store.totals()["jobs_cancelled"] == 1
    assert store.told(made.id) == []


def test_publishing_and_cancelling_at_the_same_moment_end_a_job_once(store):
    jobs = store.jobs()
    for turn in range(8):
        made = jobs.create(new_job()).id
        worker = store.worker(f"w{turn}")
        lease = worker.claim("encode", [BUNDLE])
        acts = (partial(publish, worker, lease), partial(jobs.cancel, made, None))
        at_once(2, lambda i, acts=acts: acts[i]())
        ends = [kind for kind in store.told(made) if kind in ("video.completed", "video.failed")]
        assert len(ends) == 1
    totals = store.totals()
    assert totals["jobs_accepted"] == 8
    assert totals.get("jobs_completed", 0) + totals.get("jobs_cancelled", 0) == 8


def test_the_queue_takes_no_more_than_its_limit_whoever_asks(store):
    jobs = store.jobs(queued_jobs=5)
    answers = at_once(12, lambda i: jobs.create(new_job()))
    refused = [one for one in answers if isinstance(one, RequestRefused)]
    assert len(refused) == 7
    assert {(one.status, one.code) for one in refused} == {(429, "queue_full")}
    assert all(one.retry_after_s >= 1 for one in refused)
    assert store.active() == 5
    by_cost = store.jobs(queued_cost=6.5)
    by_cost.create(new_job(cost=1.5))
    with pytest.raises(RequestRefused, match="queue_full"):
        by_cost.create(new_job(cost=0.5))


def test_quotas_are_of_each_tenant(store):
    jobs = store.jobs()
    jobs.create(new_job(tenant="a"), quota=Quota(active_jobs=1))
    with pytest.raises(RequestRefused, match="429 rate_limit_exceeded"):
        jobs.create(new_job(tenant="a"), quota=Quota(active_jobs=1))
    jobs.create(new_job(tenant="b"), quota=Quota(active_jobs=1))
    made = jobs.create(new_job(tenant="c"), quota=Quota(per_minute=1))
    jobs.delete(made.id, None)  # which gives no new turn
    with pytest.raises(RequestRefused, match="429 rate_limit_exceeded") as refused:
        jobs.create(new_job(tenant="c"), quota=Quota(per_minute=1))
    assert 1 <= refused.value.retry_after_s <= 60


def test_one_idempotency_key_makes_one_job_however_often_it_is_sent(store):
    jobs = store.jobs()
    same = {"request_hash": "same"}
    made = at_once(8, lambda i: jobs.create(new_job(**same), key="k").id)
    assert len(set(made)) == 1
    assert jobs.create(new_job(**same, tenant="other"), key="k").id not in made
    with pytest.raises(RequestRefused, match="409 idempotency_key_reused"):
        jobs.create(new_job(request_hash="another"), key="k")
    jobs.delete(made[0], None)
    assert jobs.create(new_job(**same), key="k").id != made[0]
    assert jobs.create(new_job(request_hash="another"), key="k2").request_hash == "another"


def test_an_old_idempotency_key_is_forgotten(store):
    jobs = store.jobs(keep={"idempotency_s": 0.01})
    first = jobs.create(new_job(request_hash="same"), key="k")
    threading.Event().wait(0.05)
    assert jobs.create(new_job(request_hash="same"), key="k").id != first.id


def test_a_retry_without_a_key_gets_the_first_tries_job(store):
    jobs = store.jobs()
    first = jobs.create(new_job(request_hash="same"))
    assert jobs.create(new_job(request_hash="same"), is_retry=True).id == first.id
    assert jobs.create(new_job(request_hash="same")).id != first.id
    assert jobs.create(new_job(request_hash="same", tenant="b"), is_retry=True).tenant == "b"
    assert jobs.create(new_job(request_hash="new"), is_retry=True).request_hash == "new"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_show_every_job_once(store, order):
    jobs = store.jobs()
    made = [jobs.create(new_job()).id for _ in range(7)]
    jobs.create(new_job(tenant="other"))
    seen, after, more = [], None, True
    while more:
        page, more = jobs.page("anybody", 3, order, after)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == (made if order == "asc" else made[::-1])
    with pytest.raises(RequestRefused, match="404"):
        jobs.page("other", 3, order, made[0])


def test_the_load_is_what_waits_and_runs(store):
    jobs, worker = store.jobs(), store.worker("a")
    for cost in (1.0, 2.0, 4.0):
        jobs.create(new_job(cost=cost))
    finish(worker)
    lease = worker.claim("encode", [BUNDLE])
    worker.advance(lease, "denoise", saved=SAVED, timings={}, seconds=0.0)
    lease = worker.claim("denoise", [BUNDLE])
    worker.progress(lease, step=2, expert="semantic", timings={})
    load = jobs.load()
    assert (load.queued, load.running, load.leased) == (1, 1, 1)
    assert load.by_stage == pytest.approx({"encode": 4.0, "denoise": 2.0 * 3 / 5})
    assert load.remaining == pytest.approx(4.0 + 2.0 * 3 / 5)
    last = jobs.page(None, 1, "desc", None)[0][0]
    waiting, seconds = jobs.ahead(last)
    assert waiting == 0
    assert seconds == pytest.approx(load.remaining * jobs.speed())
    assert jobs.speed() == pytest.approx(0.1)


def test_a_store_that_cannot_be_used_is_refused_without_its_password(tmp_path):
    with pytest.raises(InvalidValue, match="sqlite:///FILE"):
        open_database("mysql://me:secret@nowhere/db")
    with pytest.raises(InvalidValue, match="a file"):
        open_database("sqlite://")
    with pytest.raises(InvalidValue) as refused:
        open_database("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(refused.value)
