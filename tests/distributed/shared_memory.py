"""What lies in shared memory, where everything must be gone after a test."""

import time
from pathlib import Path


def shared_memory() -> set[str]:
    """Return the names in /dev/shm, without Python's semaphores: tests run side by side, and theirs live."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


def left_since(before: set[str]) -> set[str]:
    """Return the names that came and do not go: those of tests beside this one live for moments."""
    for _ in range(300):
        if not (left := shared_memory() - before):
            break
        time.sleep(0.1)
    return left
