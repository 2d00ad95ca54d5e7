"""API keys: 256 random bits, of which the store keeps the sha256 alone."""

import hashlib
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from raydistill.errors import InvalidValue, RequestRefused
from raydistill.service.store import NO_QUOTA, Quota
from raydistill.service.tables import API_KEYS, Database

SCOPES = ("generate", "admin")
PREFIX = "rd-"
ANYBODY = "anybody"
WINDOW_S, MOST_ADDRESSES = 60.0, 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant: str
    scopes: frozenset[str]
    quota: Quota = NO_QUOTA

    @property
    def mine(self) -> str | None:
        """Whose jobs the caller sees: an admin those of all."""
        return None if "admin" in self.scopes else self.tenant

    def require(self, scope: str) -> None:
        """Raise RequestRefused (403) without the scope."""
        if not {scope, "admin"} & self.scopes:
            message = f"this key may not do that: it lacks the scope '{scope}'"
            raise RequestRefused(403, "insufficient_scope", message)


OPEN = Caller(ANYBODY, frozenset(SCOPES))
"""Everybody, where no key is required."""


class ApiKeys:
    """The table of keys."""

    def __init__(self, database: Database):
        """Use the job store's own database."""
        self.database = database

    def create(self, name: str, scopes: Collection[str], *, per_minute: int = 0, active_jobs: int = 0) -> str:
        """Make a key and return it: nobody can read it again. 0 is no limit. Raises InvalidValue."""
        if not re.fullmatch(r"[\w.-]{1,64}", name) or name == ANYBODY:
            raise InvalidValue("name", name, "1 to 64 letters, digits, dots, dashes")
        if not scopes or set(scopes) - set(SCOPES):
            raise InvalidValue("scopes", sorted(scopes), f"of {', '.join(SCOPES)}")
        key = PREFIX + secrets.token_urlsafe(32)
        row = {"hash": _hash(key), "name": name, "scopes": sorted(scopes), "per_minute": per_minute}
        with self.database.write() as connection:
            if connection.execute(select(API_KEYS).where(API_KEYS.c.name == name)).first():
                raise InvalidValue("name", name, "a name that was never used: videos are kept under it")
            now = self.database.now()
            connection.execute(sa.insert(API_KEYS).values(**row, active_jobs=active_jobs, created_at=now))
        return key

    def revoke(self, name: str) -> None:
        """End a key. Raises InvalidValue if there is no valid one of this name."""
        valid = (API_KEYS.c.name == name) & API_KEYS.c.revoked_at.is_(None)
        with self.database.write() as connection:
            gone = sa.update(API_KEYS).where(valid).values(revoked_at=self.database.now())
            if not connection.execute(gone).rowcount:
                raise InvalidValue(
                    "name", name, "a key that is valid: there is none of this name, see action=list"
                )

    def list(self) -> list[dict[str, Any]]:
        """Return all keys, without the keys."""
        shown = [column for column in API_KEYS.c if column.name != "hash"]
        with self.database.read() as connection:
            rows = connection.execute(select(*shown).order_by(API_KEYS.c.name)).all()
        return [dict(row._mapping) for row in rows]

    def find(self, key: str) -> Caller | None:
        """Return who holds a key; None for a wrong or revoked one.

        The look-up is by hash: how long it takes tells nothing about the key.
        """
        with self.database.read() as connection:
            valid = (API_KEYS.c.hash == _hash(key)) & API_KEYS.c.revoked_at.is_(None)
            row = connection.execute(select(API_KEYS).where(valid)).first()
        if row is None:
            return None
        return Caller(row.name, frozenset(row.scopes), Quota(row.per_minute, row.active_jobs))


class Failures:
    """Counts wrong keys by address, within this process; for any number of threads."""

    def __init__(self, per_minute: int):
        """So many are answered 401 in a minute, more 429."""
        self.per_minute = per_minute
        self._seen = dict[str, deque[float]]()
        self._lock = threading.Lock()

    def add(self, address: str) -> None:
        """One more. Raises RequestRefused (429) for an address that tried too often."""
        now = time.monotonic()
        with self._lock:
            if len(self._seen) >= MOST_ADDRESSES:
                self._forget(now)
            seen = self._seen.setdefault(address, deque(maxlen=self.per_minute))
            full = len(seen) == self.per_minute and seen[0] > now - WINDOW_S
            if not full:
                seen.append(now)
        if full:
            message = "too many wrong API keys from this address"
            wait = WINDOW_S - (now - seen[0])
            raise RequestRefused(429, "rate_limit_exceeded", message, retry_after_s=wait)

    def _forget(self, now: float) -> None:
        """Let go of addresses that have been quiet for a minute."""
        for address in [one for one, seen in self._seen.items() if seen[-1] < now - WINDOW_S]:
            del self._seen[address]


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
