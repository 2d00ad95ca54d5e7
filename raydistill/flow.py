"""Be connected to Ray: to the cluster that runs this job, or to one of our own that leaves nothing behind."""

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raydistill.errors import RaydistillError

Row = TypeVar("Row")


@contextmanager
def connect(num_cpus: int = 0, object_store_mib: int = 0) -> Iterator[None]:
    """Connect for the duration of a `with` block.

    A connection that exists is used and left alone. Within a submitted job, or with RAY_ADDRESS set, that
    cluster is joined. Otherwise a cluster of our own is started on this machine, with `num_cpus` (0: as many
    as there are) and an object store of `object_store_mib`, and ended with the block; its logs, and what
    workers print, are kept only if something unexpected happened. An object store of 0 is Ray's choice, 30 %
    of the machine's memory; RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION and _MAX_MEMORY_BYTES change it.
    """
    if ray.is_initialized():
        yield
        return
    _quieten()
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A short path: Ray keeps Unix sockets below it, and their names may have 107 characters.
    place = "/tmp" if os.path.isdir("/tmp") else None
    logs = tempfile.mkdtemp(prefix=f"raydistill-{os.getpid()}-", dir=place)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus or None,
            object_store_memory=object_store_mib * 2**20 or None,
            include_dashboard=False,
            log_to_driver=False,  # what Ray's own actors complain of without a dashboard would drown progress
            logging_level=logging.WARNING,
            _temp_dir=logs,
        )
        yield
    except Exception as failed:
        if not isinstance(failed, RaydistillError):
            failed.add_note(f"Ray's logs are kept in {logs}")
            logs = ""
        raise
    finally:
        ray.shutdown()
        if logs:
            shutil.rmtree(logs, ignore_errors=True)


class Paced(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest; for `DataContext.custom_execution_callback_classes`.

    The loop waits for tasks only while one of them has nothing to deliver. As long as the reader is slower
    than the flow, which is how training should be, it spins and takes a core away.
    """

    PAUSE_S = 0.02

    def on_execution_step(self, executor: object) -> None:
        """Called after each round of the loop."""
        time.sleep(self.PAUSE_S)


def _quieten() -> None:
    """Keep Ray's announcements off the console: the jobs print progress of their own."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray.data", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.")


def ours_unwrapped(rows: Iterable[Row]) -> Iterator[Row]:
    """Pass on what a Ray Data flow yields; an error that raydistill raised in a worker comes as it was."""
    try:
        yield from rows
    except Exception as failed:  # Ray wraps in types of its own choosing
        ours = raised_by_us(failed)
        if ours is None:
            raise
        raise ours from None


def raised_by_us(failed: BaseException) -> RaydistillError | None:
    """Return the error that raydistill raised in a Ray worker, out of those that Ray wrapped around it."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [failed]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseException) and error not in seen:
            if type(error).__module__ == RaydistillError.__module__ and isinstance(error, RaydistillError):
                return error
            seen.append(error)
            todo += [error.__cause__, error.__context__, getattr(error, "cause", None)]
    return None
