"""How many replicas the waiting work needs. Knows no Ray: what `serve/app.py` names as Serve's policy.

Serve's own count of requests in flight says nothing here, as replicas pull their work from the store.
"""

import logging
import math
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from raydistill.config.serve import KeepConfig, LimitsConfig, Stage, from_environment
from raydistill.errors import MissingArtifact
from raydistill.service.store import JobStore, Load
from raydistill.service.tables import open_database

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.25


def replicas_for(load: Load, seconds_per_cost: float, drain_s: float, stage: Stage | None = None) -> int:
    """Replicas that end all that waits and runs within `drain_s` seconds; 0 if and only if there is nothing.

    stage: of a pool that does this stage alone; it is woken when a job enters the pipeline, so that it is
    there when the job arrives. seconds_per_cost: 0 as long as nothing was measured; then one replica will.
    """
    if not load.queued + load.running:
        return 0
    cost = load.remaining if stage is None else load.by_stage.get(stage, 0.0)
    return max(1, math.ceil(cost * seconds_per_cost / drain_s))


class ByRemainingCost:
    """A Serve autoscaling policy: it answers the controller from what a thread of its own read last.

    So the controller never waits for a database. While the store does not answer, the number stays as it is.
    """

    def __init__(self, store: str, drain_s: float = 10.0, stage: Stage | None = None, stale_s: float = 10.0):
        """store: as in ServeConfig. drain_s: see `replicas_for`."""
        self.url, self.drain_s, self.stale_s = store, drain_s, stale_s
        self.stage: Stage | None = stage
        self.wanted, self.looked_at = 0, -math.inf
        threading.Thread(target=_look, args=(weakref.ref(self),), daemon=True, name="queue-policy").start()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's AutoscalingContext -> replicas, and no state; Serve applies its bounds and delays."""
        if time.monotonic() - self.looked_at > self.stale_s:
            return context.target_num_replicas, {}
        return self.wanted, {}

    def look(self, store: JobStore) -> None:
        """Read the store once."""
        load = store.load()
        self.wanted = replicas_for(load, store.speed(), self.drain_s, self.stage)
        self.looked_at = time.monotonic()


def _look(policy: "weakref.ref[ByRemainingCost]") -> None:
    """Look again and again, until Serve has let go of the policy."""
    store: JobStore | None = None
    pause_s = LOOK_EVERY_S
    while (mine := policy()) is not None:
        try:
            if store is None:
                url = from_environment(mine.url, "store")
                _require_there(url)
                store = JobStore(open_database(url), LimitsConfig(), KeepConfig())
            mine.look(store)
            pause_s = LOOK_EVERY_S
        except Exception:  # whatever it is, the next look may do better, and replicas stay as they are
            log.warning("the job store did not tell what waits", exc_info=True)
            pause_s = min(5.0, pause_s * 2)
        del mine
        time.sleep(pause_s)
    if store is not None:
        store.database.engine.dispose()


def _require_there(url: str) -> None:
    """Raise MissingArtifact for an SQLite file that is not there: an empty one says that nothing waits."""
    file = url.removeprefix("sqlite:///")
    if file != url and not Path(file).is_file():
        raise MissingArtifact(
            f"no job store at {Path(file).absolute()}: the policy's store is not the server's"
        )
