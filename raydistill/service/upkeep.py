"""The janitor's round: what expired, what nobody serves, what no job names, which replicas went silent."""

import logging
from collections.abc import Collection, Mapping

import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from raydistill.config.serve import KeepConfig
from raydistill.errors import RaydistillError
from raydistill.service.bundle import read_bundle
from raydistill.service.files import Files
from raydistill.service.journal import Journal, say
from raydistill.service.tables import ACTIVE, ENDED, EVENTS, JOBS, KEYS_SEEN, WORKERS, Database, Job

log = logging.getLogger(__name__)
VIDEOS, WORK = "videos", "work"


class Janitor:
    """Keeps the store and the files as the settings say; any number of them may run."""

    def __init__(self, database: Database, files: Files, keep: KeepConfig, lease_s: float):
        """`lease_s`: a replica silent for two of them is taken off the list."""
        self.database, self.files, self.keep, self.lease_s = database, files, keep, lease_s
        self.journal = Journal(database)

    def try_round(self, bundles: Mapping[str, str]) -> None:
        """Do a round for the bundles in these folders; what goes wrong is logged, and tried again later."""
        try:
            self.round([read_bundle(folder).label for folder in bundles.values()])
        except (SQLAlchemyError, OSError, RaydistillError):
            log.warning("the janitor's round failed", exc_info=True)

    def round(self, bundles: Collection[str]) -> dict[str, int]:
        """Do everything once; `bundles` are the labels that are served. Returns what was done, by name."""
        done = {
            "workers": self._silent_workers(),
            "unserved": self._unserved(bundles),
            "expired": self._expired(),
            "records": self._old_records(),
            "files": self._orphans(),
        }
        if any(done.values()):
            log.info("janitor: %s", ", ".join(f"{count} {name}" for name, count in done.items() if count))
        return done

    def _silent_workers(self) -> int:
        with self.database.write() as connection:
            silent = WORKERS.c.seen_at < self.database.now() - 2 * self.lease_s
            return connection.execute(sa.delete(WORKERS).where(silent)).rowcount

    def _unserved(self, bundles: Collection[str]) -> int:
        """Fail what has waited too long for a bundle that no replica will ever hold."""
        gone = JOBS.c.state.in_(ACTIVE) & JOBS.c.bundle.not_in(bundles)
        late = gone & (JOBS.c.created_at < self.database.now() - self.keep.orphans_s)
        ended = list[Job]()
        with self.database.write() as connection:
            numbers = connection.execute(select(JOBS.c.number).where(late)).scalars().all()
            for number in numbers:
                error = (
                    "model_unavailable",
                    "the version chosen for this video is no longer served: ask again",
                )
                job = self.journal.end(connection, JOBS.c.number == number, "failed", error)
                ended += [job] if job else []
        for job in ended:
            say("failed", job, code="model_unavailable")
        return len(ended)

    def _expired(self) -> int:
        with self.database.write() as connection:
            old = (JOBS.c.expires_at < self.database.now()) & (JOBS.c.expired == 0)
            mark = sa.update(JOBS).where(old).values(expired=1).returning(JOBS.c.id)
            names = connection.execute(mark).scalars().all()
        for name in names:
            self.files.remove(f"{VIDEOS}/{name}")
        return len(names)

    def _old_records(self) -> int:
        now = self.database.now()
        with self.database.write() as connection:
            old = JOBS.c.state.in_(ENDED) & (JOBS.c.completed_at < now - self.keep.records_s)
            names = connection.execute(sa.delete(JOBS).where(old).returning(JOBS.c.id)).scalars().all()
            if names:
                connection.execute(sa.delete(EVENTS).where(EVENTS.c.job.in_(names)))
            connection.execute(sa.delete(KEYS_SEEN).where(KEYS_SEEN.c.at < now - self.keep.idempotency_s))
        return len(names)

    def _orphans(self) -> int:
        """Remove files that no job names: of deleted jobs, and states of jobs that ended otherwise."""
        removed = 0
        for folder, states in ((WORK, ACTIVE), (VIDEOS, (*ACTIVE, *ENDED))):
            names = self.files.folders(folder)  # before the jobs are read: a new job's folder comes later
            with self.database.read() as connection:
                kept = connection.execute(select(JOBS.c.id).where(JOBS.c.state.in_(states)))
                known = set(kept.scalars().all())
            for name in set(names) - known:
                self.files.remove(f"{folder}/{name}")
                removed += 1
        return removed
