"""The janitor's round: what expired, what nobody serves, what no job names, which replicas went silent."""

import logging
import time
import uuid
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy import select

from raydistill.config.serve import KeepConfig
from raydistill.errors import ArtifactError
from raydistill.service.files import Files
from raydistill.service.journal import Journal, say
from raydistill.service.tables import ABOUT, ACTIVE, ENDED, EVENTS, JOBS, KEYS_SEEN, WORKERS, Database, Job

log = logging.getLogger(__name__)
VIDEOS, WORK = "videos", "work"
MARK = "store.id"
BATCH = 500
"""Rows of one transaction, at most."""


class Janitor:
    """Keeps the store and the files as the settings say; any number of them may run."""

    def __init__(self, database: Database, files: Files, keep: KeepConfig, lease_s: float):
        """`lease_s`: a replica silent for two of them is taken off the list."""
        self.database, self.files, self.keep, self.lease_s = database, files, keep, lease_s
        self.journal = Journal(database)
        self._since = dict[str, float]()

    def round(self, bundles: Collection[str]) -> dict[str, int]:
        """Do everything once; `bundles` are the labels that are served. Returns what was done, by name.

        What goes wrong is logged, keeps nothing else from being done, and is tried again in the next round.
        """
        parts = {
            "silent replicas": self._silent_workers,
            "unserved jobs": lambda: self._unserved(bundles),
            "expired videos": self._expired,
            "old records": self._old_records,
            "files of nobody": self._orphans,
        }
        done = dict[str, int]()
        for name, part in parts.items():
            try:
                done[name] = part()
            except Exception:
                log.exception("the janitor could not see to: %s", name)
        if any(done.values()):
            log.info("janitor: %s", ", ".join(f"{count} {name}" for name, count in done.items() if count))
        return done

    def _overdue(self, kind: str, names: Collection[str]) -> set[str]:
        """Return those that have been so, round after round, for longer than `keep.orphans_s`."""
        now, keys = time.monotonic(), {f"{kind} {name}": name for name in names}
        for gone in [key for key in self._since if key.startswith(f"{kind} ") and key not in keys]:
            del self._since[gone]
        since = {name: self._since.setdefault(key, now) for key, name in keys.items()}
        return {name for name, first in since.items() if now - first >= self.keep.orphans_s}

    def _silent_workers(self) -> int:
        with self.database.write() as connection:
            silent = WORKERS.c.seen_at < self.database.now() - 2 * self.lease_s
            return connection.execute(sa.delete(WORKERS).where(silent)).rowcount

    def _unserved(self, bundles: Collection[str]) -> int:
        """Fail what waits for a bundle that has not been served for too long."""
        with self.database.read() as connection:
            asked = select(JOBS.c.bundle).where(JOBS.c.state.in_(ACTIVE)).distinct()
            wanted = set(connection.execute(asked).scalars())
            held = connection.execute(select(WORKERS.c.bundles)).scalars().all()
        served = set(bundles).union(*held)
        late = JOBS.c.bundle.in_(self._overdue("bundle", wanted - served)) & JOBS.c.state.in_(ACTIVE)
        ended, error = list[Job](), ("model_unavailable", "its version is no longer served: ask again")
        with self.database.write() as connection:
            for number in connection.execute(select(JOBS.c.number).where(late)).scalars().all():
                job = self.journal.end(connection, JOBS.c.number == number, "failed", error)
                ended += [job] if job else []
        for job in ended:
            say("failed", job, code="model_unavailable")
        return len(ended)

    def _expired(self) -> int:
        """Remove files, then say so: a removal that failed is tried again."""
        old = (JOBS.c.expires_at < self.database.now()) & (JOBS.c.expired == 0)
        with self.database.read() as connection:
            names = connection.execute(select(JOBS.c.id).where(old).limit(BATCH)).scalars().all()
        for name in names:
            self.files.remove(f"{VIDEOS}/{name}")
            with self.database.write() as connection:
                connection.execute(sa.update(JOBS).where(JOBS.c.id == name).values(expired=1))
                shown = (EVENTS.c.job == name) & (EVENTS.c.kind == "video.partial_frame")
                connection.execute(sa.delete(EVENTS).where(shown))
        return len(names)

    def _old_records(self) -> int:
        now = self.database.now()
        old = JOBS.c.state.in_(ENDED) & (JOBS.c.completed_at < now - self.keep.records_s)
        with self.database.write() as connection:
            names = connection.execute(select(JOBS.c.id).where(old).limit(BATCH)).scalars().all()
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.job.in_(names)))
            connection.execute(sa.delete(JOBS).where(JOBS.c.id.in_(names)))
            connection.execute(sa.delete(KEYS_SEEN).where(KEYS_SEEN.c.at < now - self.keep.idempotency_s))
        return len(names)

    def _orphans(self) -> int:
        """Remove states of jobs that ended, and after a while files that no job names: of deleted ones."""
        self._require_ours()
        removed = 0
        for folder in (WORK, VIDEOS):
            names = set(
                self.files.folders(folder)
            )  # before the jobs are read: a new job's folder comes later
            with self.database.read() as connection:
                states = dict(map(tuple, connection.execute(select(JOBS.c.id, JOBS.c.state)).all()))
            over = {name for name in names if folder == WORK and states.get(name) in ENDED}
            for name in over | self._overdue(folder, names - set(states)):
                self.files.remove(f"{folder}/{name}")
                removed += 1
        return removed

    def _require_ours(self) -> None:
        """Raise ArtifactError where another store's files are: to this one, nobody names them."""
        with self.database.write() as connection:
            known = connection.execute(select(ABOUT.c.value).where(ABOUT.c.name == "id")).scalar()
            if known is None:
                known = uuid.uuid4().hex
                connection.execute(sa.insert(ABOUT).values(name="id", value=known))
        if MARK not in self.files.folders("."):
            self.files.write(MARK, known.encode())
        elif (found := b"".join(self.files.chunks(MARK, 0, len(known))).decode()) != known:
            raise ArtifactError(
                f"the artefacts are those of store {found}, not of {known}: nothing is removed"
            )
