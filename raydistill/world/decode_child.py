"""The process that touches untrusted files.

A decoder may loop forever in native code, crash, or eat all memory; then this process dies, and nothing else.
It reads one JSON request per line from one pipe, answers on another, and leaves frames in shared memory. It
never imports torch: decord and torch in one process crash.
"""

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from raydistill.errors import MediaError
from raydistill.world import media, pictures

Answer = tuple[dict[str, Any], np.ndarray | None]


def answer_probe(request: Mapping[str, Any]) -> Answer:
    """Look into a video."""
    found = media.probe(request["path"], media.Limits(**request["limits"]))
    return {"probe": found.to_json()}, None


def answer_frames(request: Mapping[str, Any]) -> Answer:
    """Decode frames of a probed video."""
    found = media.Probe.from_json(request["probe"])
    frames, why = media.read_frames(request["path"], found, request["pts"], request["decoder"])
    return {"fallback": why}, frames


def answer_image(request: Mapping[str, Any]) -> Answer:
    """Decode a picture."""
    return {}, pictures.read_image(request["path"], media.Limits(**request["limits"]))


ANSWERS: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
    "probe": answer_probe,
    "frames": answer_frames,
    "image": answer_image,
}


def confine(memory_bytes: int) -> None:
    """Bound the address space, write no core file, die with the parent, keep decoders off the console."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: also when hanging while the parent is killed
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)


def handle(request: Mapping[str, Any], frames_fd: int) -> dict[str, Any]:
    """Answer one request; a file's fault is an answer too, a fault of ours is reported as one."""
    try:
        reply, frames = ANSWERS[request["do"]](request)
        if frames is not None:
            _leave(frames, frames_fd)
            reply["shape"] = list(frames.shape)
        return reply
    except MediaError as bad:
        return {"reason": bad.reason, "message": bad.message}
    except MemoryError:
        return {"reason": "oom", "message": "decoding needs more memory than allowed"}
    except Exception:
        return {"bug": traceback.format_exc()}


def _leave(frames: np.ndarray, fd: int) -> None:
    """Copy an array into the shared memory."""
    os.ftruncate(fd, 0)
    os.ftruncate(fd, frames.nbytes)
    with mmap.mmap(fd, frames.nbytes) as memory:
        memory.write(np.ascontiguousarray(frames).data.cast("B"))


def main(argv: list[str]) -> None:
    """Serve requests until the parent closes the pipe. Arguments: three file descriptors, bytes of memory."""
    requests_fd, replies_fd, frames_fd, memory_bytes = (int(value) for value in argv)
    confine(memory_bytes)
    with open(requests_fd, encoding="utf-8") as requests, open(replies_fd, "w", encoding="utf-8") as replies:
        for line in requests:
            replies.write(json.dumps(handle(json.loads(line), frames_fd)) + "\n")
            replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
