"""Make, list and revoke API keys of the server.

    python jobs/keys.py action=create name=alice per_minute=60 active_jobs=4
    python jobs/keys.py action=create name=prometheus scopes=[admin] > runs/serve/prometheus.key
    python jobs/keys.py action=list
    python jobs/keys.py action=revoke name=alice store=env:RAYDISTILL_STORE

A key alone goes to the standard output, what there is to say of it to the other one. Every server of the
store knows it from the next request on.
"""

import sys

from raydistill.config.keys import KeysConfig
from raydistill.config.load import from_command_line, read_early, run

if __name__ == "__main__":
    read_early(KeysConfig)

from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from raydistill.config.serve import from_environment
from raydistill.service.keys import ApiKeys
from raydistill.service.tables import open_database


def table_of(keys: list[dict[str, Any]]) -> Table:
    """A row per key: its name, what it may do, since when and until when. 0 of a quota is no limit."""
    shown = Table(caption="times are UTC")
    for column in ("name", "scopes", "videos a minute", "at a time", "made", "revoked"):
        shown.add_column(column, overflow="fold")
    for key in keys:
        quota = (str(key[name] or "any") for name in ("per_minute", "active_jobs"))
        times = (_time(key[name]) for name in ("created_at", "revoked_at"))
        shown.add_row(key["name"], " ".join(key["scopes"]), *quota, *times)
    return shown


def _time(seconds: float | None) -> str:
    """Minutes are enough."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _show(keys: list[dict[str, Any]], place: str) -> None:
    if not keys:
        _say(f"no keys in {place}: action=create name=NAME makes one")
        return
    terminal = Console()
    if not terminal.is_terminal:  # a file has room for the whole table
        terminal.width = 160
    terminal.print(table_of(keys))


def main() -> None:
    """Do one thing to the table of keys."""
    config, _ = from_command_line(KeysConfig, sys.argv[1:])
    store = from_environment(config.store, "store")
    keys = ApiKeys(open_database(store, create=config.action == "create"))
    place = make_url(store).render_as_string(hide_password=True)
    match config.action:
        case "create":
            quota = {"per_minute": config.per_minute, "active_jobs": config.active_jobs}
            key = keys.create(config.name, config.scopes, **quota)
            _say(f"the key of {config.name}, in {place}; keep it now, it cannot be shown again:")
            print(key, flush=True)
        case "revoke":
            keys.revoke(config.name)
            _say(f"the key of {config.name} is no longer valid, in {place}")
        case "list":
            _show(keys.list(), place)


if __name__ == "__main__":
    run(main)
