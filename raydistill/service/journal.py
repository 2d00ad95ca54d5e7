"""What is written beside a job's row, in the same transaction: its events, and the totals of all jobs.

Totals are rows of the store and not counters of a process: every replica answers with the same figures, none
is lost with a replica, and accepted = completed + failed + cancelled + active holds at every moment.
"""

import logging
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from raydistill.artifacts import canonical_json
from raydistill.service.tables import EVENTS, JOBS, TOTALS, Database, Job, job_of

log = logging.getLogger(__name__)
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper ends of the histograms, in seconds."""


class Journal:
    """Writes events and totals into a transaction of the store."""

    def __init__(self, database: Database):
        """Use the database's own dialect and clock."""
        self.database = database
        self.insert = sqlite.insert if database.is_sqlite else postgresql.insert

    def tell(self, connection: sa.Connection, job: str, kind: str, data: Mapping[str, Any]) -> None:
        """Append an event; its number is the id by which clients replay."""
        now = self.database.now()
        connection.execute(sa.insert(EVENTS).values(job=job, kind=kind, data=dict(data), at=now))

    def count(
        self, connection: sa.Connection, name: str, labels: Mapping[str, str], value: float = 1
    ) -> None:
        """Add to a total."""
        row = {"name": name, "labels": canonical_json(dict(labels)).decode(), "value": value}
        added = self.insert(TOTALS).values(row)
        connection.execute(
            added.on_conflict_do_update(
                index_elements=[TOTALS.c.name, TOTALS.c.labels], set_={"value": TOTALS.c.value + value}
            )
        )

    def observe(
        self, connection: sa.Connection, name: str, labels: Mapping[str, str], seconds: float
    ) -> None:
        """Add to a histogram: the bucket that it falls into, and the sum."""
        at = bisect_left(BUCKETS, seconds)
        bound = f"{BUCKETS[at]:g}" if at < len(BUCKETS) else "+Inf"
        self.count(connection, f"{name}_bucket", {**labels, "le": bound})
        self.count(connection, f"{name}_sum", labels, seconds)

    def end(
        self,
        connection: sa.Connection,
        where: sa.ColumnElement[bool],
        state: str,
        error: tuple[str, str] | None = None,
        **values: Any,
    ) -> Job | None:
        """Let the job that fits `where` end once and for all; None if there is none such.

        error: code and message, of what did not complete.
        """
        code, message = error or (None, None)
        ended = {
            "state": state,
            "owner": None,
            "lease_until": None,
            "fence": JOBS.c.fence + 1,
            "remaining": 0.0,
        }
        now = self.database.now()
        # What was made of a video that did not complete is to be removed at once.
        values = {"expires_at": now, **values, **ended, "completed_at": now}
        values |= {"error_code": code, "error_message": message}
        row = connection.execute(sa.update(JOBS).where(where).values(values).returning(JOBS)).first()
        if row is None:
            return None
        job = job_of(row)
        labels = {"model": job.model, "bundle": job.bundle}
        if state == "failed":
            self.count(connection, "jobs_failed", {**labels, "code": code or "internal_error"})
        else:
            self.count(connection, f"jobs_{state}", labels)
        seconds = (job.completed_at or 0.0) - job.created_at
        self.observe(connection, "job_seconds", {**labels, "state": state}, seconds)
        self.tell(connection, job.id, f"video.{'completed' if state == 'completed' else 'failed'}", {})
        return job


def say(what: str, job: Job, **more: Any) -> None:
    """Log what happened to a job, once its transaction is through.

    One line names each accepted job and one its end: the accounting can be checked from the logs alone.
    """
    fields = {"job": job.id, "model": job.model, "bundle": job.bundle, "attempt": job.attempt, **more}
    log.info("job %s", what, extra={"happened": what, **fields})
