"""JSON lines of what happened: one object a line whatever users send, and files that may be moved away."""

import json
import logging
import os

import pytest

from raydistill.service.http import REQUEST_ID
from raydistill.service.logs import ROOT, log_to


@pytest.fixture
def log():
    """The service's logger, as it was afterwards."""
    logger = logging.getLogger(ROOT)
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield logging.getLogger(f"{ROOT}.test")
    for handler in set(logger.handlers) - set(before[2]):
        logger.removeHandler(handler)
        handler.close()
    logger.level, logger.propagate = before[:2]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_record_is_one_object_on_one_line_that_users_cannot_forge(log, tmp_path):
    log_to(str(tmp_path / "logs"), "ingress")
    log_to(str(tmp_path / "logs"), "ingress")  # again: nothing is written twice
    token = REQUEST_ID.set("r-1")
    log.info('a prompt\n{"happened": "published"}\u2028\x1b[0m', extra={"happened": "accepted", "job": "v"})
    REQUEST_ID.reset(token)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    log.debug("not said")
    accepted, failed = lines(tmp_path / "logs" / f"ingress-{os.getpid()}.jsonl")
    assert {name: accepted[name] for name in ("happened", "job", "request_id", "level", "pid")} == {
        "happened": "accepted", "job": "v", "request_id": "r-1", "level": "INFO", "pid": os.getpid(),
    }  # fmt: skip
    assert accepted["message"].startswith("a prompt\n")
    assert "happened" not in failed
    assert "ValueError: first\nsecond" in failed["error"]


def test_a_file_that_was_moved_away_is_begun_anew(log, tmp_path):
    log_to(str(tmp_path), "janitor")
    path = tmp_path / f"janitor-{os.getpid()}.jsonl"
    log.info("one")
    path.rename(tmp_path / "old")
    log.info("two")
    assert [line["message"] for line in lines(tmp_path / "old") + lines(path)] == ["one", "two"]
