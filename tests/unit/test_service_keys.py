"""API keys and the job that makes them: a key is told once and kept nowhere; guessing them is slow."""

import runpy
import sys
import time
from pathlib import Path

import pytest
from store_cases import new_database, postgres

from raydistill.config.keys import KeysConfig
from raydistill.config.load import from_command_line
from raydistill.config.serve import ServeConfig
from raydistill.errors import InvalidValue, MissingValue, RequestRefused
from raydistill.service.keys import SCOPES, ApiKeys, Failures
from raydistill.service.store import Quota
from raydistill.service.tables import open_database

JOB = Path(__file__).resolve().parents[2] / "jobs" / "keys.py"


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path}/store/jobs.sqlite"


@pytest.fixture
def keys(store):
    database = open_database(store)
    yield ApiKeys(database)
    database.engine.dispose()


@pytest.fixture
def run_job(store, monkeypatch, capfd):
    """Run jobs/keys.py in this process, on the store; returns its exit status and what it printed."""

    def run_job(*arguments, store=store):
        monkeypatch.setattr(sys, "argv", [str(JOB), *arguments, f"store={store}"])
        try:
            runpy.run_path(str(JOB), run_name="__main__")
            status = 0
        except SystemExit as left:
            status = left.code
        return status, *capfd.readouterr()

    return run_job


def files_of(store):
    """All bytes of the database, its log included."""
    found = sorted(Path(store.removeprefix("sqlite:///")).parent.iterdir())
    assert found
    return b"".join(path.read_bytes() for path in found)


def test_a_key_is_found_with_what_it_may_do(keys):
    alice = keys.create("alice", ["generate"], per_minute=60, active_jobs=4)
    boss = keys.create("boss", ["admin", "generate"])
    caller = keys.find(alice)
    assert (caller.tenant, caller.scopes, caller.quota) == ("alice", {"generate"}, Quota(60, 4))
    assert caller.mine == "alice"
    caller.require("generate")
    with pytest.raises(RequestRefused) as refused:
        caller.require("admin")
    assert (refused.value.status, refused.value.code) == (403, "insufficient_scope")
    caller = keys.find(boss)
    assert (caller.tenant, caller.scopes, caller.quota) == ("boss", set(SCOPES), Quota())
    assert caller.mine is None
    caller.require("admin")


def test_a_wrong_key_is_not_found_nor_one_that_was_revoked(keys):
    alice, other = keys.create("alice", ["generate"]), keys.create("other", ["generate"])
    wrong = [alice[:-1], alice + "x", alice.swapcase(), alice.removeprefix("rd-"), "", "rd-", "alice", "'--"]
    assert [keys.find(one) for one in wrong] == [None] * len(wrong)
    keys.revoke("alice")
    assert keys.find(alice) is None
    assert keys.find(other).tenant == "other"
    with pytest.raises(InvalidValue, match="there is none of this name"):
        keys.revoke("alice")
    with pytest.raises(InvalidValue, match="a name that was never used"):
        keys.create("alice", ["generate"])  # her videos are still there
    assert [(one["name"], one["revoked_at"] is None) for one in keys.list()] == [
        ("alice", False),
        ("other", True),
    ]


def test_keys_cannot_be_guessed_from_one_another(keys):
    made = [keys.create(f"key{n}", ["generate"]) for n in range(20)]
    assert len({one[:12] for one in made}) == len(made)
    assert all(len(one) == len("rd-") + 43 for one in made)  # 256 bits in base64


def test_the_text_of_a_key_is_nowhere_in_the_database(keys, store):
    key = keys.create("alice", ["generate"], per_minute=7)
    keys.find(key)
    keys.revoke("alice")
    held = files_of(store)
    assert b"alice" in held
    assert key.encode() not in held
    assert key.removeprefix("rd-").encode() not in held
    assert all("hash" not in row and key not in map(str, row.values()) for row in keys.list())


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "a/b", "a\n", "a'--", "anybody"])
def test_names_that_are_refused(keys, name):
    with pytest.raises(InvalidValue) as refused:
        keys.create(name, ["generate"])
    assert refused.value.key == "name"
    assert keys.list() == []


@pytest.mark.parametrize("scopes", [[], ["root"], ["generate", "root"], ["Generate"]])
def test_scopes_that_are_refused(keys, scopes):
    with pytest.raises(InvalidValue) as refused:
        keys.create("alice", scopes)
    assert refused.value.key == "scopes"
    assert keys.list() == []


def test_the_job_tells_a_key_once_and_alone(run_job, keys, store):
    status, out, err = run_job("action=create", "name=alice", "per_minute=60", "active_jobs=4")
    assert status == 0
    key = out.strip()
    assert out == f"{key}\n"  # so that it can be sent into a file
    assert key not in err
    assert "cannot be shown again" in err
    assert keys.find(key).quota == Quota(60, 4)
    assert keys.find(key).scopes == {"generate"}
    assert key.encode() not in files_of(store)
    for arguments in (["action=list"], ["action=revoke", "name=alice"], ["action=list"]):
        status, out, err = run_job(*arguments)
        assert status == 0
        assert key not in out + err
        assert key[3:] not in out + err
    assert keys.find(key) is None


def test_the_job_lists_keys_with_what_they_may_do(run_job, keys):
    assert run_job("action=list")[:2] == (0, "")
    run_job("action=create", "name=alice", "per_minute=61", "active_jobs=4")
    run_job("action=create", "name=prometheus", "scopes=[admin, generate]")
    run_job("action=revoke", "name=alice")
    status, out, _ = run_job("action=list")
    assert status == 0
    year = time.strftime("%Y-", time.gmtime())
    rows = {line.split()[1]: line for line in out.splitlines() if year in line}
    assert rows.keys() == {"alice", "prometheus"}
    assert {"generate", "61", "4"} <= set(rows["alice"].split())
    assert "admin generate" in rows["prometheus"]
    assert (rows["alice"].count(year), rows["prometheus"].count(year)) == (2, 1)  # revoked, and not


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["action=create", "name=a b"], "InvalidValue: name"),
        (["action=create", "name=anybody"], "InvalidValue: name"),
        (["action=create", "name=bob", "scopes=[root]"], "InvalidValue: scopes"),
        (["action=create", "name=bob", "scopes=[]"], "InvalidValue: scopes"),
        (["action=create", "name=bob", "per_minute=-1"], "InvalidValue: per_minute"),
        (["action=create", "name=bob", "active_jobs=-1"], "InvalidValue: active_jobs"),
        (["action=create", "name=taken"], "InvalidValue: name"),
        (["action=create"], "MissingValue: name"),
        (["action=revoke"], "MissingValue: name"),
        (["action=revoke", "name=nobody"], "InvalidValue: name"),
        (["action=remove", "name=taken"], "InvalidValue: action"),
        (["create", "name=bob"], "InvalidValue: argument"),
        (["name=bob"], "MissingValue: action"),
    ],
)
def test_what_the_job_refuses_it_refuses_in_one_line_and_makes_nothing(run_job, keys, arguments, said):
    keys.create("taken", ["generate"])
    status, out, err = run_job(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert [one["name"] for one in keys.list()] == ["taken"]


def test_a_password_comes_from_the_environment_and_is_not_printed(run_job, keys, store, monkeypatch):
    monkeypatch.setenv("STORE_OF_KEYS", store)
    assert run_job("action=create", "name=alice", store="env:STORE_OF_KEYS")[0] == 0
    assert [one["name"] for one in keys.list()] == ["alice"]
    status, _, err = run_job("action=list", store="env:NO_SUCH_STORE")
    assert (status, err.split(":")[0]) == (2, "MissingValue")
    monkeypatch.setenv("STORE_OF_KEYS", "postgresql+psycopg://me:hunter2@127.0.0.1:1/none")
    status, out, err = run_job("action=list", store="env:STORE_OF_KEYS")
    assert (status, err.split(":")[0]) == (2, "InvalidValue")
    assert "hunter2" not in out + err


def test_keys_lie_in_postgres_too_and_its_password_is_not_printed(run_job):
    with postgres() as server:
        store = new_database(server.set(password="hunter2"))
        status, key, made = run_job("action=create", "name=alice", store=store)
        assert status == 0
        database = open_database(store)
        assert ApiKeys(database).find(key.strip()).tenant == "alice"
        database.engine.dispose()
        shown = [run_job(action, "name=alice", store=store) for action in ("action=list", "action=revoke")]
    assert [status for status, _, _ in shown] == [0, 0]
    assert all("hunter2" not in said for said in (made, *shown[0][1:], *shown[1][1:]))
    assert "postgresql+psycopg://" in made


def test_settings_are_the_servers_own():
    config, _ = from_command_line(KeysConfig, ["action=list"])
    assert config.store == ServeConfig().store
    with pytest.raises(MissingValue):
        KeysConfig(action="create")


def test_so_many_failures_are_allowed_in_a_minute_from_each_address():
    failures = Failures(3)
    for _ in range(3):
        failures.add("a")
    with pytest.raises(RequestRefused) as refused:
        failures.add("a")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert 0 < refused.value.retry_after_s <= 60
    failures.add("b")


class Clock:
    """What `Failures` takes for the time: a minute need not be waited for."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_a_failure_counts_for_a_minute_and_no_longer(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("raydistill.service.keys.time", clock)
    failures = Failures(2)
    failures.add("a")
    clock.now += 40.0
    failures.add("a")
    with pytest.raises(RequestRefused) as refused:
        failures.add("a")
    assert refused.value.retry_after_s == pytest.approx(20.0)  # until the first one is forgotten
    clock.now += 19.0
    with pytest.raises(RequestRefused):
        failures.add("a")
    clock.now += 2.0
    failures.add("a")
    with pytest.raises(RequestRefused) as refused:
        failures.add("a")
    assert refused.value.retry_after_s == pytest.approx(39.0)
    clock.now += 61.0
    failures.add("a")


def test_addresses_that_fell_silent_are_forgotten(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("raydistill.service.keys.time", clock)
    monkeypatch.setattr("raydistill.service.keys.MOST_ADDRESSES", 3)
    failures = Failures(2)
    for address in "abc":
        failures.add(address)
    clock.now += 61.0
    failures.add("d")
    assert set(failures._seen) == {"d"}


@pytest.mark.parametrize("action", ["list", "revoke"])
def test_looking_into_a_store_that_is_not_there_makes_none(run_job, tmp_path, action):
    path = tmp_path / "mistyped" / "jobs.sqlite"
    status, out, err = run_job(f"action={action}", "name=a", store=f"sqlite:///{path}")
    assert (status, out) == (2, "")
    assert "no such file" in err
    assert not path.parent.exists()
