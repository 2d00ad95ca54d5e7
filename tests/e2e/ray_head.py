"""A Ray head of our own that wants a token, ended by its own process id."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil


def free_ports(count: int) -> list[int]:
    """Ports that nobody has; outside 10002-19999, where Ray puts its workers."""
    held = []
    for port in range(23000 + os.getpid() % 5000, 60000):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        held.append(port)
        if len(held) == count:
            break
    return held


@contextlib.contextmanager
def ray_head(**more: str):
    """A running head; yields its address and the environment that its clients need, and `more` of it."""
    # Short: Ray keeps Unix sockets below, and their names may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **more,
    }
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--object-store-memory={200 * 2**20}"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={folder}/ray",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_ready(process, address, token.read_text(), folder / "log")
        yield address, environment
    finally:
        # All at once by process id: asked politely, Ray drains a head without work for 30 s.
        family = psutil.Process(process.pid).children(recursive=True)
        for one in (*family, process):
            one.kill()
        process.wait(timeout=30)
        assert not psutil.wait_procs(family, timeout=30)[1]
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(process: subprocess.Popen, address: str, token: str, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(log.read_text())
