"""Logs as JSON lines, with the request's id: what happened to each job can be read by a program."""

import json
import logging
import logging.handlers
import os
import sys
import time
from pathlib import Path

from raydistill.service.http import REQUEST_ID

FIELDS = ("happened", "job", "model", "bundle", "attempt", "stage", "step", "code")
ROOT = "raydistill.service"


class JsonLines(logging.Formatter):
    """One object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Render; text of users is escaped, so that it cannot forge a line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if request := REQUEST_ID.get():
            line["request_id"] = request
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to(folder: str, role: str) -> None:
    """Send the service's log to FOLDER/ROLE-PID.jsonl, or to stderr for an empty folder; once per process.

    A file that was moved away, as logrotate does, is begun anew.
    """
    logger = logging.getLogger(ROOT)
    if any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
        return
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{role}-{os.getpid()}.jsonl"
        handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
