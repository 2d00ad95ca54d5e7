"""Ray Serve as a cluster runs it: `serve deploy` of a config on a head of our own, asked over real HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from conformance import QUEUED_JOBS
from ray_head import free_ports, ray_head

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle moves slowly left over a plain background"


def serve_config(folder: Path, bundles: dict[str, str], port: int, pipeline: str) -> dict:
    """serve/tiny.yaml with everything of it in `folder`, and quick to notice what happens."""
    config = yaml.safe_load((ROOT / "serve" / "tiny.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    store = f"sqlite:///{folder}/jobs.sqlite"
    application["args"] |= {"store": store, "artifacts": f"{folder}/artifacts", "logs": f"{folder}/logs"}
    application["args"] |= {"bundles": bundles, "pipeline": pipeline}
    application["args"]["worker"] |= {"lease_s": 2, "heartbeat_s": 0.5}
    application["args"]["limits"] |= {"body_timeout_s": 5, "queued_jobs": QUEUED_JOBS}
    scaling = deployment(config, "Sampler")["autoscaling_config"]
    scaling |= {"upscale_delay_s": 0.5, "downscale_delay_s": 5, "downscale_to_zero_delay_s": 5}
    scaling["policy"]["policy_kwargs"] = {"store": store, "drain_s": 2}
    if pipeline == "staged":  # a pool for each stage, with what is in serve/app.py
        application["deployments"] = [one for one in application["deployments"] if one["name"] != "Sampler"]
    return config


def deployment(config: dict, name: str) -> dict:
    return next(one for one in config["applications"][0]["deployments"] if one["name"] == name)


class Served:
    """A running head with the application deployed on it."""

    def __init__(self, folder: Path, address: str, environment: dict[str, str], config: dict):
        self.folder, self.address, self.environment, self.config = folder, address, environment, config
        self.port = config["http_options"]["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self) -> None:
        """Deploy the config as it is now, and wait until it is so."""
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        self._serve("deploy", str(file))
        for _ in range(360):
            status = yaml.safe_load(self._serve("status"))
            state = status["applications"]["raydistill"]["status"]
            assert state != "DEPLOY_FAILED", status
            if state == "RUNNING" and self.answers():
                return
            time.sleep(0.25)
        raise AssertionError(status)

    def _serve(self, *command: str) -> str:
        line = ["serve", command[0], "--address", self.address, *command[1:]]
        done = subprocess.run(
            line, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def answers(self) -> bool:
        try:
            return self.ask("/ready")[0] == 200
        except OSError:
            return False

    def ask(self, path: str, body: dict | None = None, method: str | None = None, **headers: str):
        """Status, headers, and the body read as JSON where it is."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, headers, data = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            status, headers, data = error.code, error.headers, error.read()
        is_json = headers.get("content-type", "").startswith("application/json")
        return status, headers, json.loads(data) if is_json else data

    def create(self, **fields) -> str:
        status, _, made = self.ask("/v1/videos", {"prompt": PROMPT, **fields})
        assert status == 200, made
        return made["id"]

    def show(self, job: str) -> dict:
        status, _, shown = self.ask(f"/v1/videos/{job}")
        assert status == 200, shown
        return shown

    def wait(self, job: str, timeout_s: float = 300.0) -> dict:
        deadline = time.monotonic() + timeout_s
        while (shown := self.show(job))["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        return shown

    def workers(self) -> list[dict]:
        return self.ask("/v1/admin/workers")[2]["data"]

    def wait_for_workers(self, wanted, timeout_s: float = 90.0) -> list[dict]:
        deadline = time.monotonic() + timeout_s
        while not wanted(found := self.workers()):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found

    def logged(self) -> list[dict]:
        """Every line that the processes wrote about jobs."""
        lines = []
        for path in sorted((self.folder / "logs").glob("*.jsonl")):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if "happened" in line]


@contextlib.contextmanager
def served(folder: Path, bundles: dict[str, str], pipeline: str = "monolithic"):
    """Ray, Serve and the application in their own processes."""
    port = free_ports(8)[-1]  # the first ones are the head's
    guard = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raydistill.service.guard.in_proxy",
        "RAYDISTILL_GUARD": json.dumps({"body_timeout_s": 5}),
    }
    with ray_head(PYTHONPATH=str(ROOT), **guard) as (address, clients):
        running = Served(folder, address, clients, serve_config(folder, bundles, port, pipeline))
        running.deploy()
        yield running


class Killer:
    """Kills a sampler process again and again, each time one that lives, until `count` are dead."""

    def __init__(self, server: Served, count: int):
        self.server, self.count, self.killed = server, count, []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        deadline = time.monotonic() + 480
        while len(self.killed) < self.count and time.monotonic() < deadline:
            alive = [one["pid"] for one in self.server.workers() if one["pid"] not in self.killed]
            if alive:
                time.sleep(0.4)  # let it take some work
                with contextlib.suppress(ProcessLookupError):
                    os.kill(alive[0], signal.SIGKILL)
                    self.killed.append(alive[0])
            time.sleep(0.05)
