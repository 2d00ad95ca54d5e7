"""The job store's tables, and how they are opened: SQLite on one machine, Postgres for several.

Nothing about a job lives anywhere else, so that any process can answer for any job and no process is needed
for what was accepted.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Float, Index, Integer, String, Text, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from raydistill.errors import InvalidValue

META = sa.MetaData()
SECONDS = Float(53)
ACTIVE = ("queued", "running")
ENDED = ("completed", "failed", "cancelled")


class Json(sa.TypeDecorator[Any]):
    """A JSON value kept as text: the same bytes in every database."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """To the database."""
        return None if value is None else json.dumps(value, separators=(",", ":"), allow_nan=False)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        """From the database."""
        return None if value is None else json.loads(value)


JOBS = sa.Table(
    "jobs",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("bundle", String(128), nullable=False),
    Column("request", Json, nullable=False),
    Column("request_hash", String(64), nullable=False),
    Column("remixed_from", String(64)),
    Column("state", String(16), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("expert", String(16)),
    Column("cost", SECONDS, nullable=False),
    Column("remaining", SECONDS, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("owner", String(64)),
    Column("leased_at", SECONDS),
    Column("lease_until", SECONDS),
    Column("not_before", SECONDS, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("strikes", Integer, nullable=False),
    Column("saved", Json),
    Column("timings", Json, nullable=False),
    Column("result", Json),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("expired", Integer, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("started_at", SECONDS),
    Column("completed_at", SECONDS),
    Column("expires_at", SECONDS),
    Index("jobs_claim", "state", "stage", "number"),
    Index("jobs_tenant", "tenant", "state"),
    Index("jobs_retry", "tenant", "request_hash"),
    sqlite_autoincrement=True,  # a deleted job's number is never given again
)
EVENTS = sa.Table(
    "events",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("job", String(64), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data", Json, nullable=False),
    Column("at", SECONDS, nullable=False),
    Index("events_job", "job", "number"),
    sqlite_autoincrement=True,
)
ADMISSIONS = sa.Table(  # beside the jobs, which their owners may delete
    "admissions",
    META,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("at", SECONDS, nullable=False),
    Index("admissions_tenant", "tenant", "at"),
)
ABOUT = sa.Table(
    "about",
    META,
    Column("name", String(64), primary_key=True),
    Column("value", String(64), nullable=False),
)
KEYS_SEEN = sa.Table(
    "idempotency",
    META,
    Column("tenant", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    Column("job", String(64), nullable=False),
    Column("at", SECONDS, nullable=False),
)
TOTALS = sa.Table(
    "totals",
    META,
    Column("name", String(64), primary_key=True),
    Column("labels", String(255), primary_key=True),
    Column("value", SECONDS, nullable=False),
)
WORKERS = sa.Table(
    "workers",
    META,
    Column("id", String(64), primary_key=True),
    Column("pid", Integer, nullable=False),
    Column("node", String(128), nullable=False),
    Column("bundles", Json, nullable=False),
    Column("stages", Json, nullable=False),
    Column("started_at", SECONDS, nullable=False),
    Column("seen_at", SECONDS, nullable=False),
)
SPEEDS = sa.Table(
    "speeds",
    META,
    Column("bundle", String(128), primary_key=True),
    Column("seconds_per_cost", SECONDS, nullable=False),
)
API_KEYS = sa.Table(
    "api_keys",
    META,
    Column("hash", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("scopes", Json, nullable=False),
    Column("per_minute", Integer, nullable=False),
    Column("active_jobs", Integer, nullable=False),
    Column("created_at", SECONDS, nullable=False),
    Column("revoked_at", SECONDS),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table of jobs: times are seconds since 1970, by the clock of the database."""

    number: int
    id: str
    tenant: str
    model: str
    bundle: str
    request: Mapping[str, Any]
    """As it was accepted: prompt, plan, seed, shape."""
    request_hash: str
    remixed_from: str | None
    state: str
    """queued, running, completed, failed, cancelled."""
    stage: str
    step: int
    num_steps: int
    expert: str | None
    cost: float
    remaining: float
    fence: int
    """Counts claims: a writer that knows an older one is refused."""
    owner: str | None
    leased_at: float | None
    lease_until: float | None
    not_before: float
    attempt: int
    strikes: int
    """Attempts in a row that died without getting on."""
    saved: Mapping[str, Any] | None
    """Where the work so far lies: file, its sha256, and the step after which it was saved."""
    timings: Mapping[str, float]
    """Seconds by stage, and network passes."""
    result: Mapping[str, Any] | None
    error_code: str | None
    error_message: str | None
    expired: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in ENDED


_JOB_FIELDS = tuple(f.name for f in fields(Job))


def job_of(row: Any) -> Job:
    """Make a Job of a row with all columns."""
    values = row._mapping
    return Job(**{name: values[name] for name in _JOB_FIELDS})


@dataclass(frozen=True)
class Database:
    """An open store and the clock that all its users agree on."""

    engine: sa.Engine

    @property
    def is_sqlite(self) -> bool:
        """One machine's file, whose users share the machine's clock."""
        return self.engine.dialect.name == "sqlite"

    def now(self) -> Any:
        """The time in seconds since 1970, as an SQL expression: machines' own clocks may differ."""
        if self.is_sqlite:
            return sa.literal(time.time(), SECONDS)
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), SECONDS)

    def write(self) -> Any:
        """A transaction that writes: SQLite takes its lock at once, so that it cannot fail half-way."""
        return self.engine.begin()

    def read(self) -> Any:
        """A connection that only reads, and waits for no writer."""
        return self.engine.connect().execution_options(raydistill_reads=True)

    def one_at_a_time(self, connection: sa.Connection) -> None:
        """Keep others that ask the same out until the transaction ends: it counts before it writes."""
        if not self.is_sqlite:  # SQLite has one writer anyway
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x5244)))


def open_database(url: str, *, create: bool = True) -> Database:
    """Open the store and create what is missing.

    create: an SQLite file that is not there is made; else that is an error, too.
    Raises InvalidValue for a URL that cannot be used.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:  # what may hold a password is not repeated
        raise InvalidValue("store", url.partition(":")[0], "an SQLAlchemy URL, sqlite:///FILE") from error
    hidden = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidValue("store", hidden, "sqlite:///FILE or postgresql+psycopg://HOST/DATABASE")
    if not create and parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise InvalidValue("store", hidden, "a store that is there: no such file")
    try:
        database = Database(_sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgres(parsed))
        with database.write() as connection:
            database.one_at_a_time(connection)
            META.create_all(connection)
    except (SQLAlchemyError, ImportError, OSError) as error:
        why = str(getattr(error, "orig", error)).splitlines()[0]
        raise InvalidValue("store", hidden, f"a database that answers: {why}") from error
    return database


def _sqlite(url: sa.URL) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise InvalidValue("store", str(url), "a file: processes share it")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": 60.0})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver's own transactions start too late, see `begin`
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reads = connection.get_execution_options().get("raydistill_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _postgres(url: sa.URL) -> sa.Engine:
    # Ready for a server that went away and came back.
    return sa.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
