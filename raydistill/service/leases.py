"""The job store as a sampler replica sees it: claim a job's next stage, say that it lives, hand on, publish.

A claim is a lease with a fence: a number that grows with every claim and that every later write must still
find in the row. A replica that was thought dead, a job that was cancelled: their writers learn it by
LeaseLost and stop, and nothing is published twice.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from raydistill.config.serve import Stage, WorkerConfig
from raydistill.errors import LeaseLost
from raydistill.service.journal import Journal, say
from raydistill.service.tables import ACTIVE, JOBS, SPEEDS, WORKERS, Database, Job, job_of

RECENT = 0.2
"""Weight of the newest job in the average seconds per cost."""


@dataclass(frozen=True)
class Lease:
    """A job as it was claimed; valid until another claim, a cancellation, or silence of its holder."""

    job: Job
    stage: Stage


class Leases:
    """Claims and fenced writes of one worker."""

    def __init__(self, database: Database, worker: str, config: WorkerConfig):
        """`worker` is unique to this process: another one never continues its leases."""
        self.database, self.worker, self.config = database, worker, config
        self.journal = Journal(database)
        self._about: dict[str, Any] = {}
        self._in_hand = set[int]()
        self._lock = threading.Lock()

    def register(self, pid: int, node: str, bundles: Sequence[str], stages: Sequence[str]) -> None:
        """Announce the worker, or what it holds by now."""
        self._about = {"pid": pid, "node": node, "bundles": list(bundles), "stages": list(stages)}
        with self.database.write() as connection:
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == self.worker))
            self._enter(connection)

    def _enter(self, connection: sa.Connection) -> None:
        now = self.database.now()
        row = {"id": self.worker, **self._about, "started_at": now, "seen_at": now}
        connection.execute(sa.insert(WORKERS).values(**row))

    def leave(self) -> None:
        """Take the worker off the list."""
        with self.database.write() as connection:
            connection.execute(sa.delete(WORKERS).where(WORKERS.c.id == self.worker))

    def heartbeat(self) -> None:
        """Renew the leases of what is worked on, but those of stages that take too long to be alive.

        A job that is held in the store alone, as an answer of it was lost, is not renewed: others take it.
        """
        now = self.database.now()
        with self._lock:
            in_hand = list(self._in_hand)
        mine = (JOBS.c.owner == self.worker) & (JOBS.c.state == "running") & JOBS.c.number.in_(in_hand)
        with self.database.write() as connection:
            connection.execute(
                sa.update(JOBS)
                .where(mine & (JOBS.c.leased_at > now - self.config.stage_timeout_s))
                .values(lease_until=now + self.config.lease_s)
            )
            seen = sa.update(WORKERS).where(WORKERS.c.id == self.worker)
            if not connection.execute(seen.values(seen_at=now)).rowcount:
                self._enter(connection)  # it was taken off the list, and lives

    def done(self, lease: Lease) -> None:
        """Nobody here works on the job any more."""
        with self._lock:
            self._in_hand.discard(lease.job.number)

    def claim(self, stage: Stage, bundles: Sequence[str]) -> Lease | None:
        """Take the oldest job that waits at `stage`, or whose holder went silent; None if there is none."""
        free = self._free(stage, bundles)
        oldest = select(JOBS).where(free).order_by(JOBS.c.number).limit(1)
        with self.database.read() as connection:  # most looks find nothing: they shall not wait for a lock
            if connection.execute(oldest).first() is None:
                return None
        with self.database.write() as connection:
            found = connection.execute(oldest.with_for_update(skip_locked=True)).first()
            if found is None:
                return None
            job = job_of(found)
            abandoned = job.owner is not None
            if abandoned and job.strikes + 1 >= self.config.strikes:
                message = f"{job.strikes + 1} replicas died over this video: please report it"
                here = JOBS.c.number == job.number
                ended = self.journal.end(connection, here, "failed", ("internal_error", message))
                claimed = None
            else:
                ended, claimed = None, self._take(connection, job, abandoned)
            if abandoned:
                self.journal.count(connection, "takeovers", _labels(job))
        if ended is not None:
            say("failed", ended, code="internal_error")
        if claimed is None:
            return None
        with self._lock:
            self._in_hand.add(claimed.number)
        if abandoned:
            say("taken over", claimed, stage=stage, step=claimed.step)
        return Lease(claimed, stage)

    def _free(self, stage: Stage, bundles: Sequence[str]) -> sa.ColumnElement[bool]:
        now = self.database.now()
        waits = JOBS.c.state.in_(ACTIVE) & (JOBS.c.stage == stage) & JOBS.c.bundle.in_(bundles)
        free = waits & (JOBS.c.not_before <= now) & (JOBS.c.owner.is_(None) | (JOBS.c.lease_until < now))
        if stage != "encode":
            return free
        other = JOBS.alias()  # of those that this worker could denoise: others wait for somebody else
        encoded = (other.c.state == "running") & (other.c.stage == "denoise") & other.c.owner.is_(None)
        encoded &= other.c.bundle.in_(bundles) & (other.c.not_before <= now)
        ahead = select(func.count()).select_from(other).where(encoded).scalar_subquery()
        return free & (ahead < self.config.encode_ahead)

    def _take(self, connection: sa.Connection, job: Job, abandoned: bool) -> Job:
        now = self.database.now()
        first = job.state == "queued"
        values: dict[str, Any] = {
            "state": "running",
            "owner": self.worker,
            "leased_at": now,
            "lease_until": now + self.config.lease_s,
            "fence": JOBS.c.fence + 1,
            "attempt": job.attempt + (1 if first or abandoned else 0),
            "strikes": job.strikes + (1 if abandoned else 0),
        }
        if first:
            values["started_at"] = now
        here = JOBS.c.number == job.number
        claimed = job_of(connection.execute(sa.update(JOBS).where(here).values(values).returning(JOBS)).one())
        if first:
            waited = (claimed.started_at or 0.0) - claimed.created_at
            self.journal.observe(connection, "wait_seconds", _labels(claimed), waited)
            return self._write(connection, Lease(claimed, "encode"), timings={"queue_s": waited})
        return claimed

    def _write(self, connection: sa.Connection, lease: Lease, **values: Any) -> Job:
        """Change the row if the lease still holds. Raises LeaseLost."""
        row = connection.execute(
            sa.update(JOBS).where(self._held(lease)).values(values).returning(JOBS)
        ).first()
        if row is None:
            raise LeaseLost(f"{lease.job.id}: cancelled, or taken over by another replica")
        return job_of(row)

    def _held(self, lease: Lease) -> sa.ColumnElement[bool]:
        fence = (JOBS.c.number == lease.job.number) & (JOBS.c.fence == lease.job.fence)
        return fence & (JOBS.c.owner == self.worker)

    def progress(
        self,
        lease: Lease,
        *,
        step: int,
        expert: str,
        passes: int = 1,
        timings: Mapping[str, float],
        saved: Mapping[str, Any] | None = None,
        preview: Mapping[str, Any] | None = None,
    ) -> None:
        """Say that `step` steps are done, the last by which expert in how many network passes.

        saved: where the state is, if it was saved.
        """
        job = lease.job
        told = {"stage": lease.stage, "expert": expert, "step": step, "num_steps": job.num_steps}
        values: dict[str, Any] = {"step": step, "expert": expert, "timings": dict(timings)}
        values |= {"remaining": job.cost * (1 - step / (job.num_steps + 1))}
        if saved is not None:
            values |= {"saved": dict(saved), "strikes": 0}
        with self.database.write() as connection:
            self._write(connection, lease, **values)
            self.journal.tell(connection, job.id, "video.in_progress", told)
            if preview is not None:
                self.journal.tell(connection, job.id, "video.partial_frame", preview)
            self.journal.count(connection, "passes", {**_labels(job), "expert": expert}, passes)

    def keep(self, lease: Lease, saved: Mapping[str, Any], timings: Mapping[str, float]) -> None:
        """Say where the state was saved. Raises LeaseLost."""
        with self.database.write() as connection:
            self._write(connection, lease, saved=dict(saved), timings=dict(timings), strikes=0)

    def advance(
        self,
        lease: Lease,
        stage: Stage,
        *,
        saved: Mapping[str, Any],
        timings: Mapping[str, float],
        seconds: float,
    ) -> None:
        """End this stage, which took `seconds`: any replica may take up the next."""
        told = {"stage": stage, "step": lease.job.step, "num_steps": lease.job.num_steps}
        with self.database.write() as connection:
            job = self._write(
                connection,
                lease,
                stage=stage,
                owner=None,
                lease_until=None,
                strikes=0,
                not_before=0.0,
                saved=dict(saved),
                timings=dict(timings),
            )
            self.journal.tell(connection, job.id, "video.in_progress", {**told, "step": job.step})
            stages = {**_labels(job), "stage": lease.stage}
            self.journal.observe(connection, "stage_seconds", stages, seconds)

    def publish(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        timings: Mapping[str, float],
        seconds: float,
        keep_s: float,
    ) -> Job:
        """Make the video known: from here on it is there, once. Raises LeaseLost."""
        with self.database.write() as connection:
            values = {"result": dict(result), "timings": dict(timings)}
            expires = self.database.now() + keep_s
            held = self._held(lease)
            job = self.journal.end(connection, held, "completed", **values, expires_at=expires)
            if job is None:
                raise LeaseLost(f"{lease.job.id}: cancelled, or taken over by another replica")
            stages = {**_labels(job), "stage": lease.stage}
            self.journal.observe(connection, "stage_seconds", stages, seconds)
            worked = sum(timings.get(f"{name}_s", 0.0) for name in ("encode", "denoise", "decode"))
            self._measure(connection, job.bundle, worked / job.cost)
        say("published", job)
        return job

    def _measure(self, connection: sa.Connection, bundle: str, seconds_per_cost: float) -> None:
        here = SPEEDS.c.bundle == bundle
        old = connection.execute(select(SPEEDS.c.seconds_per_cost).where(here)).scalar()
        if old is None:
            connection.execute(
                self.journal.insert(SPEEDS)
                .values(bundle=bundle, seconds_per_cost=seconds_per_cost)
                .on_conflict_do_nothing()
            )
        else:
            value = (1 - RECENT) * old + RECENT * seconds_per_cost
            connection.execute(sa.update(SPEEDS).where(here).values(seconds_per_cost=value))

    def fail(self, lease: Lease, code: str, message: str) -> None:
        """End the job without a video. Raises LeaseLost."""
        with self.database.write() as connection:
            job = self.journal.end(connection, self._held(lease), "failed", (code, message))
        if job is None:
            raise LeaseLost(f"{lease.job.id}: cancelled, or taken over by another replica")
        say("failed", job, code=code)

    def release(self, lease: Lease, *, wait_s: float = 0.0, strike: bool = False) -> None:
        """Give the job back as it was last saved, to be tried again after `wait_s`. Raises LeaseLost.

        strike: it counts against the job, which fails when that was one too many.
        """
        if strike and lease.job.strikes + 1 >= self.config.strikes:
            message = f"it failed {lease.job.strikes + 1} times in a row: please report it"
            self.fail(lease, "internal_error", message)
            return
        with self.database.write() as connection:
            job = self._write(
                connection,
                lease,
                owner=None,
                lease_until=None,
                not_before=self.database.now() + wait_s,
                attempt=JOBS.c.attempt + 1,
                strikes=JOBS.c.strikes + (1 if strike else 0),
            )
        say("given back", job, stage=lease.stage)


def _labels(job: Job) -> dict[str, str]:
    return {"model": job.model, "bundle": job.bundle}
