"""The job store as the ingress sees it: create, read, list, cancel, delete.

Admission is decided where the row is written, over all jobs of all replicas: a count that every replica makes
for itself lets bursts through.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import func, select

from raydistill.config.serve import KeepConfig, LimitsConfig
from raydistill.errors import RequestRefused
from raydistill.service.journal import Journal, say
from raydistill.service.tables import (
    ACTIVE,
    ADMISSIONS,
    EVENTS,
    JOBS,
    KEYS_SEEN,
    SPEEDS,
    WORKERS,
    Database,
    Job,
    job_of,
)

Mine = str | None
"""A tenant; None sees the jobs of all."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A request that was found good."""

    id: str
    tenant: str
    model: str
    bundle: str
    request: Mapping[str, Any]
    request_hash: str
    """Of the request as it came, before a seed was drawn or a version chosen."""
    num_steps: int
    cost: float
    remixed_from: str | None = None


@dataclass(frozen=True)
class Quota:
    """What one API key may do; 0 is no limit."""

    per_minute: int = 0
    active_jobs: int = 0


NO_QUOTA = Quota()


@dataclass(frozen=True)
class Load:
    """All jobs that wait or run."""

    queued: int
    running: int
    remaining: float
    """Cost still to be paid."""
    leased: int
    """Held by a live replica right now."""
    oldest_s: float
    """Age of the oldest that waits."""
    by_stage: Mapping[str, float]
    """Remaining cost of the jobs at each stage."""


class JobStore:
    """Jobs by id, for the process that answers requests."""

    def __init__(self, database: Database, limits: LimitsConfig, keep: KeepConfig):
        """Use the limits of the server's settings."""
        self.database, self.limits, self.keep = database, limits, keep
        self.journal = Journal(database)

    def create(
        self, new: NewJob, *, quota: Quota = NO_QUOTA, key: str | None = None, is_retry: bool = False
    ) -> Job:
        """Write a new job, or return the one that the same request made before.

        key: the request's Idempotency-Key. is_retry: the client says that it sends the request again.
        Raises RequestRefused: 409 for a key of another request, 429 for a full queue or a used-up quota.
        """
        with self.database.write() as connection:
            self.database.one_at_a_time(connection)
            if before := self._before(connection, new, key, is_retry):
                return before
            self._admit(connection, new, quota)
            now = self.database.now()
            row = connection.execute(
                sa.insert(JOBS)
                .values(
                    id=new.id,
                    tenant=new.tenant,
                    model=new.model,
                    bundle=new.bundle,
                    request=dict(new.request),
                    request_hash=new.request_hash,
                    remixed_from=new.remixed_from,
                    num_steps=new.num_steps,
                    cost=new.cost,
                    remaining=new.cost,
                    created_at=now,
                    **_FRESH,
                )
                .returning(JOBS)
            ).one()
            if key:
                seen = {"tenant": new.tenant, "key": key, "request_hash": new.request_hash, "job": new.id}
                connection.execute(sa.insert(KEYS_SEEN).values(**seen, at=now))
            self.journal.count(connection, "jobs_accepted", {"model": new.model, "bundle": new.bundle})
            self.journal.tell(connection, new.id, "video.queued", {})
        say("accepted", job := job_of(row))
        return job

    def _before(self, connection: sa.Connection, new: NewJob, key: str | None, is_retry: bool) -> Job | None:
        now = self.database.now()
        found = select(JOBS).where(JOBS.c.tenant == new.tenant)
        still = JOBS.c.state != "cancelled"
        if key:
            mine = (KEYS_SEEN.c.tenant == new.tenant) & (KEYS_SEEN.c.key == key)
            old = mine & (KEYS_SEEN.c.at < now - self.keep.idempotency_s)
            connection.execute(sa.delete(KEYS_SEEN).where(old))
            seen = connection.execute(select(KEYS_SEEN).where(mine)).first()
            if seen is None:
                return None
            if seen.request_hash != new.request_hash:
                raise RequestRefused(
                    409,
                    "idempotency_key_reused",
                    "this Idempotency-Key came with another request before: take a new one",
                )
            row = connection.execute(found.where(still & (JOBS.c.id == seen.job))).first()
            if row is None:  # deleted since, or cancelled as a client went away
                connection.execute(sa.delete(KEYS_SEEN).where(mine))
            return job_of(row) if row else None
        if not is_retry:
            return None
        same = (
            still
            & (JOBS.c.request_hash == new.request_hash)
            & (JOBS.c.created_at > now - self.keep.retry_window_s)
        )
        row = connection.execute(found.where(same).order_by(JOBS.c.number.desc()).limit(1)).first()
        return job_of(row) if row else None

    def _admit(self, connection: sa.Connection, new: NewJob, quota: Quota) -> None:
        """Raise RequestRefused (429) for what the queue or the tenant's quota does not take."""
        active = JOBS.c.state.in_(ACTIVE)
        count, cost = connection.execute(
            select(func.count(), func.coalesce(func.sum(JOBS.c.remaining), 0.0)).where(active)
        ).one()
        if count >= self.limits.queued_jobs or cost + new.cost > self.limits.queued_cost:
            wait = min(120.0, max(1.0, self._seconds(connection, new.bundle, cost) / max(1, count)))
            raise RequestRefused(
                429, "queue_full", "too much is waiting: try again later", retry_after_s=wait
            )
        mine = JOBS.c.tenant == new.tenant
        if quota.active_jobs:
            held = connection.execute(select(func.count()).where(active & mine)).scalar_one()
            if held >= quota.active_jobs:
                message = f"this key has {held} videos in work, its limit: wait for one"
                raise RequestRefused(429, "rate_limit_exceeded", message, retry_after_s=2.0)
        if quota.per_minute:
            self._admit_rate(connection, new.tenant, quota.per_minute)

    def _admit_rate(self, connection: sa.Connection, tenant: str, per_minute: int) -> None:
        now = self.database.now()
        mine = ADMISSIONS.c.tenant == tenant
        connection.execute(sa.delete(ADMISSIONS).where(mine & (ADMISSIONS.c.at <= now - 60.0)))
        made, wait_s = connection.execute(
            select(func.count(), func.min(ADMISSIONS.c.at) + 60.0 - now).where(mine)
        ).one()
        if made >= per_minute:
            message = f"this key made {made} videos within a minute, its limit"
            raise RequestRefused(429, "rate_limit_exceeded", message, retry_after_s=max(1.0, wait_s))
        connection.execute(sa.insert(ADMISSIONS).values(tenant=tenant, at=now))

    def get(self, job: str, mine: Mine) -> Job:
        """Return a job. Raises RequestRefused (404) for none, or another tenant's."""
        with self.database.read() as connection:
            return self._get(connection, job, mine)

    def _get(self, connection: sa.Connection, job: str, mine: Mine) -> Job:
        row = connection.execute(select(JOBS).where(_named(job, mine))).first()
        if row is None:
            raise RequestRefused(404, "video_not_found", f"no video '{job[:80]}'", "video_id")
        return job_of(row)

    def page(
        self, mine: Mine, limit: int, order: Literal["asc", "desc"], after: str | None
    ) -> tuple[list[Job], bool]:
        """Return jobs from the one after `after`, and whether there are more. Raises RequestRefused (404)."""
        with self.database.read() as connection:
            found = select(JOBS)
            if mine is not None:
                found = found.where(JOBS.c.tenant == mine)
            if after:
                number = self._get(connection, after, mine).number
                found = found.where(JOBS.c.number > number if order == "asc" else JOBS.c.number < number)
            by = JOBS.c.number.asc() if order == "asc" else JOBS.c.number.desc()
            rows = connection.execute(found.order_by(by).limit(limit + 1)).all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, job: str, mine: Mine) -> Job:
        """End a job at once; whoever works on it finds its lease lost at the next step.

        Raises RequestRefused: 404, and 409 for one that has ended otherwise.
        """
        with self.database.write() as connection:
            waits = _named(job, mine) & JOBS.c.state.in_(ACTIVE)
            ended = self.journal.end(
                connection, waits, "cancelled", ("cancelled", "the request was cancelled")
            )
            found = ended or self._get(connection, job, mine)
        if found.state != "cancelled":
            message = f"this video has {found.state}: there is nothing to cancel"
            raise RequestRefused(409, "video_not_cancellable", message)
        if ended is not None:
            say("cancelled", ended)
        return found

    def delete(self, job: str, mine: Mine) -> Job:
        """Remove a job with its events, cancelling it first; its files are the caller's to remove."""
        with self.database.write() as connection:
            waits = _named(job, mine) & JOBS.c.state.in_(ACTIVE)
            ended = self.journal.end(connection, waits, "cancelled", ("cancelled", "the video was deleted"))
            found = self._get(connection, job, mine)
            connection.execute(sa.delete(JOBS).where(JOBS.c.number == found.number))
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.job == found.id))
        if ended is not None:
            say("cancelled", ended)
        return found

    def events(self, job: str, after: int, limit: int = 100) -> list[tuple[int, str, dict[str, Any]]]:
        """Return (number, kind, data) of a job's events after number `after`, oldest first."""
        with self.database.read() as connection:
            later = (EVENTS.c.job == job) & (EVENTS.c.number > after)
            rows = connection.execute(
                select(EVENTS.c.number, EVENTS.c.kind, EVENTS.c.data)
                .where(later)
                .order_by(EVENTS.c.number)
                .limit(limit)
            ).all()
        return [(row.number, row.kind, row.data) for row in rows]

    def ahead(self, job: Job) -> tuple[int, float]:
        """Return how many jobs wait before this one, and the seconds until it is done, as things are."""
        with self.database.read() as connection:
            before = JOBS.c.state.in_(ACTIVE) & (JOBS.c.number < job.number)
            waits = func.coalesce(func.sum(sa.case((JOBS.c.state == "queued", 1), else_=0)), 0)
            cost = func.coalesce(func.sum(JOBS.c.remaining), 0.0)
            count, ahead = connection.execute(select(waits, cost).where(before)).one()
            seconds = self._seconds(connection, job.bundle, ahead + job.remaining)
        return int(count), seconds

    def _seconds(self, connection: sa.Connection, bundle: str, cost: float) -> float:
        """Time that a cost takes on the replicas that live; 0 as long as nothing was measured."""
        speed = connection.execute(
            select(SPEEDS.c.seconds_per_cost).where(SPEEDS.c.bundle == bundle)
        ).scalar()
        alive = connection.execute(select(func.count()).select_from(WORKERS)).scalar_one()
        return float(cost) * float(speed or 0.0) / max(1, alive)

    def speed(self) -> float:
        """Seconds per cost of the slowest bundle that is asked for; 0 as long as nothing was measured."""
        asked = select(JOBS.c.bundle).where(JOBS.c.state.in_(ACTIVE))
        with self.database.read() as connection:
            speeds = select(func.max(SPEEDS.c.seconds_per_cost)).where(SPEEDS.c.bundle.in_(asked))
            slowest = connection.execute(speeds).scalar()
        return float(slowest or 0.0)

    def load(self) -> Load:
        """Sum up what waits and runs."""
        now = self.database.now()
        with self.database.read() as connection:
            queued = JOBS.c.state == "queued"
            leased = JOBS.c.owner.is_not(None) & (JOBS.c.lease_until >= now)
            rows = connection.execute(
                select(
                    JOBS.c.stage,
                    func.count(),
                    func.sum(sa.case((queued, 1), else_=0)),
                    func.sum(JOBS.c.remaining),
                    func.sum(sa.case((leased, 1), else_=0)),
                    func.max(sa.case((queued, now - JOBS.c.created_at), else_=0.0)),
                )
                .where(JOBS.c.state.in_(ACTIVE))
                .group_by(JOBS.c.stage)
            ).all()
        everything = sum(int(row[1]) for row in rows)
        waiting = sum(int(row[2]) for row in rows)
        return Load(
            queued=waiting,
            running=everything - waiting,
            remaining=float(sum(row[3] for row in rows)),
            leased=sum(int(row[4]) for row in rows),
            oldest_s=max((float(row[5]) for row in rows), default=0.0),
            by_stage={row[0]: float(row[3]) for row in rows},
        )

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """Replicas that were heard of within two leases, as they register themselves."""
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(select(WORKERS)).all()]


_FRESH: dict[str, Any] = {
    "state": "queued",
    "stage": "encode",
    "step": 0,
    "fence": 0,
    "not_before": 0.0,
    "attempt": 0,
    "strikes": 0,
    "timings": {},
    "expired": 0,
}


def _named(job: str, mine: Mine) -> sa.ColumnElement[bool]:
    one = JOBS.c.id == job
    return one if mine is None else one & (JOBS.c.tenant == mine)
