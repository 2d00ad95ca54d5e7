"""Run a job as its user would, and see that nothing of it is left."""

import importlib.util
import io
import os
import subprocess
import sys
import time
import uuid
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
from shared_memory import left_since, shared_memory

from raydistill.artifacts import fingerprint
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import point_to, write_artifact

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
        if not (left := marked(mark)):
            break
        time.sleep(0.1)
    assert not left, left
    assert not left_since(before)
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


def write_latents(folder, codec, count, frames=16):
    """What jobs/prepare.py would have made: clips of noise, or images, with the digest of their codec."""
    identity = {"models": {"codec": {"digest": codec}}}
    draw = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    rows = [latent_row(draw((4, frames, 4, 4)), draw((8, 32)), f"clip {i}", str(i)) for i in range(count)]
    shard = write_shard(folder / "x", "part-0", rows, identity, order=0, rows_per_group=1)
    write_artifact(folder / "x", [shard], identity)
    point_to(folder, "x", fingerprint(identity))


def job_here(name, *settings):
    """Run a job in this process, which has the imports behind it; return what it printed."""
    command, printed = [f"{name}.py", *map(str, settings)], io.StringIO()
    with mock.patch.object(sys, "argv", command), redirect_stdout(printed):
        load_job(name).main()
    return printed.getvalue()


def load_job(name):
    """Import a job, to call it in this process."""
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "jobs"))
    return module
