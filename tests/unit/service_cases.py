"""A whole server in this process: real HTTP, the store, and a worker; what Ray Serve adds is left out."""

import contextlib
import threading
import time
from pathlib import Path

import uvicorn

from raydistill.config.serve import STAGES, read_args
from raydistill.service.api import Ingress, build_api
from raydistill.service.catalog import Catalog
from raydistill.service.files import Files
from raydistill.service.tables import open_database
from raydistill.service.worker import Worker

OPEN = {"required": False}
QUICK = {"checkpoint_every_s": 0, "poll_s": 0.01, "lease_s": 2.0, "heartbeat_s": 0.5, "retry_after_s": 0.1}


def settings(folder: Path, bundle: Path, **changes):
    """Settings of a server that keeps everything below `folder`; sections are changed by field."""
    values = {
        "store": f"sqlite:///{folder}/jobs.sqlite",
        "artifacts": str(folder / "artifacts"),
        "bundles": {"tiny": str(bundle)},
        "auth": OPEN,
        "worker": {**QUICK, **changes.pop("worker", {})},
    }
    return read_args({**values, **changes})


def start_worker(config, stages=STAGES) -> Worker:
    """A worker of its own connection to the store, at work."""
    database, files = open_database(config.store), Files(config.artifacts)
    worker = Worker(database, files, config.worker, config.keep, stages)
    worker.hold(config.bundle_table())
    worker.start()
    return worker


class Server:
    """An ingress behind real HTTP on a port of its own."""

    def __init__(self, config):
        self.config = config
        catalog = Catalog.read(config.bundle_table(), config.models)
        self.ingress = Ingress.open(config, config.store, catalog)
        self.store = self.ingress.store
        api = build_api(self.ingress)
        quiet = {"log_level": "error", "lifespan": "off", "timeout_keep_alive": 75}  # as in serve/tiny.yaml
        self._server = uvicorn.Server(uvicorn.Config(api, port=0, **quiet))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        self._server.should_exit = True
        self._thread.join(10)
        self.store.database.engine.dispose()


@contextlib.contextmanager
def serving(config, *, workers: int = 1):
    """A server with so many workers; yields the Server."""
    server = Server(config)
    running = [start_worker(config) for _ in range(workers)]
    try:
        yield server
    finally:
        for worker in running:
            worker.stop()
        server.close()
