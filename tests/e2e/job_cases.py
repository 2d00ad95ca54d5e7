"""Run a job as its user would, and see that nothing of it is left."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
from shared_memory import shared_memory

ROOT = Path(__file__).resolve().parents[2]


def job(name, *settings, meanwhile=None):
    """Run a job as its user would; return what it said. No process and no shared memory may be left."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, settings)]
    mark = f"e2e-{uuid.uuid4()}"
    before = shared_memory()
    environment = os.environ | {
        "RAYDISTILL_E2E": mark
    }  # Ray's processes outlive their parents; this they keep
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        if meanwhile:
            meanwhile(process)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    for _ in range(300):  # Ray's workers are niced: on a busy machine they take their time to go
        left = marked(mark), shared_memory() - before
        if not any(left):
            break
        time.sleep(0.1)
    assert not any(left), left
    return out + err


def marked(mark):
    """Command lines of the processes whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYDISTILL_E2E") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found
