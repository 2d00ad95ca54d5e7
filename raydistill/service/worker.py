"""A sampler replica: pulls jobs stage by stage until it is told to stop.

One thread per stage: while one video is denoised, the next one's text is encoded and the last one decoded.
Nothing is pushed to a replica, so nothing waits in one that dies, and one that starts finds work at once.
"""

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from sqlalchemy.exc import SQLAlchemyError

from raydistill.config.serve import KeepConfig, Stage, WorkerConfig
from raydistill.errors import ArtifactError, LeaseLost, RaydistillError
from raydistill.service.bundle import read_bundle
from raydistill.service.engine import Engine
from raydistill.service.files import Files
from raydistill.service.leases import Lease, Leases
from raydistill.service.stages import STAGES, Stages, out_of_memory
from raydistill.service.tables import Database

log = logging.getLogger(__name__)
LONGEST_WAIT_S = 60.0
SIBLING_WAKES = 10


class Worker:
    """Threads that work on the jobs of some bundles; `start`, then `stop`."""

    def __init__(
        self,
        database: Database,
        files: Files,
        config: WorkerConfig,
        keep: KeepConfig,
        stages: Sequence[Stage],
    ):
        """Nothing is loaded yet: `hold` says which bundles."""
        self.id = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.config, self.stages = config, tuple(stages)
        self.leases = Leases(database, self.id, config)
        self.stopping = threading.Event()
        self.engines: dict[str, Engine] = {}
        self._work = Stages(self.engines, self.leases, files, config, keep, self.stopping)
        self._woken = {stage: threading.Event() for stage in self.stages}
        self._silent = threading.Event()
        self._begun = dict[Stage, float]()
        self._threads = list[threading.Thread]()
        torch.set_num_threads(config.threads)

    def hold(self, bundles: Mapping[str, str]) -> None:
        """Load what is new and let go of what is no longer listed; loaded weights stay as they are.

        A bundle that cannot be loaded is left out, and said in the log: others go on. Raises ArtifactError if
        there is none that can.
        """
        wanted, broken = dict[str, Engine](), list[str]()
        for folder in bundles.values():
            try:
                label = read_bundle(folder).label
                wanted[label] = self.engines.get(label) or Engine(folder, self.config)
            except RaydistillError:
                log.exception("the bundle in %s cannot be served", folder)
                broken.append(folder)
        if not wanted:
            raise ArtifactError(
                f"no bundle can be served: {', '.join(broken) or 'none is named'}; see the log"
            )
        self.engines |= wanted
        for label in set(self.engines) - set(wanted):
            del self.engines[label]
        self.leases.register(os.getpid(), platform.node(), sorted(self.engines), self.stages)

    def start(self) -> None:
        """Begin to take jobs; once."""
        if self._threads:
            return
        loops = [(self._beat, ()), *((self._loop, (stage,)) for stage in self.stages)]
        for loop, args in loops:
            thread = threading.Thread(
                target=loop, args=args, daemon=True, name=f"worker-{(*args, 'beat')[0]}"
            )
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Take no more jobs; the step in hand is finished and saved, and the job given back."""
        self.stopping.set()
        for woken in self._woken.values():
            woken.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not self._threads[0]:  # the one that renews leases: until the last step is saved
                thread.join(max(0.0, deadline - time.monotonic()))
        self._silent.set()
        try:
            self.leases.leave()
        except SQLAlchemyError:  # it is taken off when it has been silent for long enough
            log.warning("the job store did not answer a farewell", exc_info=True)

    def alive(self) -> bool:
        """Whether every thread still runs, and none hangs in a stage."""
        hung = time.monotonic() - self.config.stage_timeout_s
        begun = list(self._begun.values())
        return all(thread.is_alive() for thread in self._threads) and all(since > hung for since in begun)

    def _beat(self) -> None:
        while not self._silent.wait(self.config.heartbeat_s):
            try:
                self.leases.heartbeat()
            except SQLAlchemyError:
                log.warning("the job store did not answer a heartbeat", exc_info=True)

    def _loop(self, stage: Stage) -> None:
        failures = 0
        first = stage == self.stages[0]
        while not self.stopping.is_set():
            try:
                lease = self.leases.claim(stage, sorted(self.engines))
                failures = 0
            except SQLAlchemyError:
                log.warning("the job store did not answer", exc_info=True)
                lease, failures = None, failures + 1
            if lease is None:
                # A sibling that ends its work wakes this one: until then a look would only hold it up, as
                # Python runs one thread at a time; and what comes from the stage before needs none.
                poll_s = self.config.poll_s * (1 if first and not self._begun else SIBLING_WAKES)
                self._woken[stage].wait(min(LONGEST_WAIT_S, poll_s * 2**failures))
                self._woken[stage].clear()
            else:
                failures = 0 if self._do(lease) else failures + 1

    def _do(self, lease: Lease) -> bool:
        """Work on one job, and say what became of it. Returns whether storage and store were there."""
        self._begun[lease.stage] = time.monotonic()
        served = True
        try:
            try:
                STAGES[lease.stage](self._work, lease)
            except (LeaseLost, SQLAlchemyError):
                raise
            except Exception as error:
                served = type(error) is not ArtifactError
                self._failed(lease, error)
        except LeaseLost as lost:
            log.info("%s", lost)
        except SQLAlchemyError:  # the lease runs out: nobody renews it
            log.warning("%s: the job store did not answer", lease.job.id, exc_info=True)
            served = False
        finally:
            self.leases.done(lease)
            self._begun.pop(lease.stage, None)
        for woken in self._woken.values():
            woken.set()
        return served

    def _failed(self, lease: Lease, error: Exception) -> None:
        """Fail what would fail again; let another replica try what might not."""
        log.warning("%s: %s failed: %s", lease.job.id, lease.stage, error, exc_info=error)
        wait_s = min(LONGEST_WAIT_S, self.config.retry_after_s * 2 ** min(16, max(0, lease.job.attempt - 1)))
        if type(error) is ArtifactError:  # storage that is away: no fault of the job
            self.leases.release(lease, wait_s=wait_s)
        elif out_of_memory(error):
            self._out_of_memory(lease, wait_s)
        elif isinstance(error, RaydistillError) and not isinstance(error, ArtifactError):
            self.leases.fail(lease, "generation_failed", str(error))
        else:  # nobody knows what
            self.leases.release(lease, wait_s=wait_s, strike=True)

    def _out_of_memory(self, lease: Lease, wait_s: float) -> None:
        """Once more, as another stage may have had the memory; then it is the video's own size."""
        if self.config.device != "cpu":
            torch.cuda.empty_cache()
        if lease.job.strikes == 0:
            self.leases.release(lease, wait_s=wait_s, strike=True)
        else:
            message = "the video did not fit into memory: ask for a smaller one"
            self.leases.fail(lease, "out_of_memory", message)


def stages_of(names: Sequence[str]) -> tuple[Stage, ...]:
    """Stages in the order that a video goes through them."""
    return tuple(cast(Stage, stage) for stage in STAGES if stage in names)
