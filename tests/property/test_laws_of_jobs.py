"""Whatever happens to jobs in whatever order: each ends once, and the books agree with the rows."""

import tempfile
from collections import Counter

import pytest
import sqlalchemy as sa
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_cases import BUNDLE, SAVED, Store, new_job, publish

from raydistill.errors import LeaseLost, RequestRefused
from raydistill.service.tables import ENDED, EVENTS, JOBS

ACTS = ("progress", "on", "publish", "fail", "release")
STAGES = ("encode", "denoise", "decode")
WORKERS = strategies.sampled_from(["a", "b"])
ANY = strategies.randoms(use_true_random=False)


class Jobs(RuleBasedStateMachine):
    """Two workers, their clients, and silence, in any order; what clients were told is kept beside."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(f"sqlite:///{self.folder.name}/jobs.sqlite")
        self.jobs = self.store.jobs(queued_jobs=4)
        self.workers = {name: self.store.worker(name, strikes=3) for name in ("a", "b")}
        self.leases = {name: [] for name in self.workers}
        self.accepted, self.ends = set(), Counter()

    def teardown(self):
        self.store.database.engine.dispose()
        self.folder.cleanup()

    @rule()
    def create(self):
        try:
            self.accepted.add(self.jobs.create(new_job()).id)
        except RequestRefused as refused:
            self.refused(refused, "queue_full")
            assert self.store.active() == 4

    @rule(name=WORKERS, stage=strategies.sampled_from(STAGES))
    def claim(self, name, stage):
        lease = self.workers[name].claim(stage, [BUNDLE])
        if lease is not None:
            self.leases[name].append(lease)

    @precondition(lambda self: any(self.leases.values()))
    @rule(
        name=WORKERS, act=strategies.sampled_from(["progress", "on", "publish", "fail", "release"]), any=ANY
    )
    def write(self, name, act, any):
        """With any lease that the worker ever had, the last or an old one."""
        if not self.leases[name]:
            return
        lease, worker = any.choice(self.leases[name]), self.workers[name]
        following = {"encode": "denoise", "denoise": "decode", "decode": "decode"}[lease.stage]
        acts = {
            "progress": lambda: worker.progress(lease, step=1, expert="semantic", timings={}, saved=SAVED),
            "on": lambda: worker.advance(lease, following, saved=SAVED, timings={}, seconds=0.1),
            "publish": lambda: publish(worker, lease),
            "fail": lambda: worker.fail(lease, "generation_failed", "no"),
            "release": lambda: worker.release(lease, strike=True),
        }
        before = self.jobs.get(lease.job.id, None) if self.exists(lease.job.id) else None
        held = before is not None and (before.fence, before.owner) == (lease.job.fence, name)
        try:
            acts[act]()
            assert held
        except LeaseLost:
            assert not held

    @precondition(lambda self: self.accepted)
    @rule(any=ANY, act=strategies.sampled_from(["cancel", "delete"]))
    def end(self, any, act):
        job = any.choice(sorted(self.accepted))
        try:
            getattr(self.jobs, act)(job, None)
        except RequestRefused as refused:
            self.refused(refused, "video_not_cancellable", "video_not_found")
        if act == "delete":
            self.accepted.discard(job)

    @rule()
    def silence(self):
        self.store.silence()

    @rule(name=WORKERS)
    def beat(self, name):
        self.workers[name].heartbeat()

    def refused(self, error, *codes):
        assert error.code in codes

    def exists(self, job):
        with self.store.database.read() as connection:
            return connection.execute(sa.select(JOBS.c.id).where(JOBS.c.id == job)).first() is not None

    @invariant()
    def the_books_agree(self):
        totals = self.store.totals()
        ended = sum(totals.get(f"jobs_{state}", 0) for state in ENDED)
        assert totals.get("jobs_accepted", 0) == ended + self.store.active()
        with self.store.database.read() as connection:
            rows = connection.execute(sa.select(JOBS)).all()
            events = connection.execute(sa.select(EVENTS.c.job, EVENTS.c.kind)).all()
        assert {row.id for row in rows} == self.accepted
        ends = Counter(job for job, kind in events if kind in ("video.completed", "video.failed"))
        assert ends == Counter(row.id for row in rows if row.state in ENDED)
        for row in rows:
            assert (row.owner is None) or row.state == "running"
            assert (row.completed_at is not None) == (row.state in ENDED)
            assert (row.result is not None) == (row.state == "completed")


TestJobs = pytest.mark.timeout(120)(Jobs.TestCase)
TestJobs.settings = settings(max_examples=25, stateful_step_count=40)
