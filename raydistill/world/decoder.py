"""The parent's side of the decode child: a deadline for every request, a fresh child after every accident."""

import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

import raydistill.errors
from raydistill.errors import MediaError
from raydistill.world.media import Limits, Probe


class Decoder:
    """A decode child and its watchdog: whatever a file does, an answer or a MediaError comes in time."""

    def __init__(
        self,
        *,
        deadline_s: float = 60.0,
        memory_bytes: int = 4 * 2**30,
        recycle_after: int = 1000,
        child: str = "raydistill.world.decode_child",
    ):
        """Start nothing yet. `child`: module or script that answers; `recycle_after` counts requests."""
        self.deadline_s, self.memory_bytes = deadline_s, memory_bytes
        self.recycle_after, self.child = recycle_after, child
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self.close()

    def probe(self, path: str, limits: Limits) -> Probe:
        """Look into a video. Raises MediaError."""
        reply, _ = self._ask({"do": "probe", "path": path, "limits": asdict(limits)})
        return Probe.from_json(reply["probe"])

    def frames(self, path: str, found: Probe, pts: Sequence[int], decoder: str) -> tuple[np.ndarray, str]:
        """Decode frames at native size, uint8 (f, h, w, 3). Raises MediaError.

        Where decord is asked and fails, PyAV stands in, within the same deadline; the second value says why.
        """
        request = {
            "do": "frames",
            "path": path,
            "probe": found.to_json(),
            "pts": list(pts),
            "decoder": decoder,
        }
        reply, frames = self._ask(request)
        return frames, reply["fallback"]

    def image(self, path: str, limits: Limits) -> np.ndarray:
        """Decode a picture, uint8 (1, h, w, 3). Raises MediaError."""
        return self._ask({"do": "image", "path": path, "limits": asdict(limits)})[1]

    def close(self) -> None:
        """End the child and free the shared memory."""
        if self._process is None:
            return
        with suppress(BrokenPipeError):
            self._requests.close()  # the child leaves at the end of its input
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._replies)
        os.close(self._shared)
        self._process = None

    def _start(self) -> None:
        """Start a child with two pipes and an anonymous shared memory, which vanish with the processes."""
        into, requests = os.pipe()
        self._replies, out = os.pipe()
        self._shared = _anonymous_memory()
        root = str(Path(raydistill.errors.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        program = [self.child] if self.child.endswith(".py") else ["-m", self.child]
        command = [sys.executable, *program, *map(str, (into, out, self._shared, self.memory_bytes))]
        self._process = subprocess.Popen(
            command,
            pass_fds=(into, out, self._shared),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        os.close(into)
        os.close(out)
        self._requests = open(requests, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the child
        self._answered = 0

    def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Send a request and wait; a crash is tried once more, in a fresh child, and without decord."""
        try:
            reply = self._exchange(request)
        except MediaError as first:
            if first.reason != "crash":
                raise
            reply = self._exchange({**request, "decoder": "pyav"})
            if request.get("decoder") == "decord" and "fallback" in reply:
                reply["fallback"] = str(first)
        if "bug" in reply:
            raise RuntimeError(f"the decode child failed at {request['path']}:\n{reply['bug']}")
        if "reason" in reply:
            raise MediaError(reply["reason"], reply["message"])
        frames = self._take(reply["shape"]) if "shape" in reply else np.empty(0, np.uint8)
        if self._answered >= self.recycle_after:
            self.close()
        return reply, frames

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request, one line back, within the deadline."""
        if self._process is None:
            self._start()
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._died() from None
        line, end = b"", time.monotonic() + self.deadline_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._kill()
                raise MediaError("timeout", f"no answer in {self.deadline_s:g} s")
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                raise self._died()
            line += chunk
        self._answered += 1
        return json.loads(line)

    def _died(self) -> MediaError:
        """Bury a dead child."""
        process = self._process
        self.close()
        code = process.returncode if process else 0
        return MediaError("crash", f"the decoder died with {'signal' if code < 0 else 'status'} {abs(code)}")

    def _kill(self) -> None:
        """End the child at once: a decoder that hangs in native code listens to nothing but SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self.close()

    def _take(self, shape: Sequence[int]) -> np.ndarray:
        """Copy an array out of the shared memory."""
        size = int(np.prod(shape))
        with mmap.mmap(self._shared, size, prot=mmap.PROT_READ) as memory:
            return np.frombuffer(memory.read(size), np.uint8).reshape(shape)


def _anonymous_memory() -> int:
    """Return a file descriptor of memory that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames", 0)
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
