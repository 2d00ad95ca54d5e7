"""A decode child in which some files hang, crash or eat memory, by their name; run as a script."""

import ctypes
import os
import re
import sys

import numpy as np

from raydistill.world import decode_child, media

honest_probe, honest_frames = media.probe, media.read_frames


def probe(path: str, limits: media.Limits) -> media.Probe:
    """Misbehave as native code does: no Python exception, no signal handler helps."""
    name = os.path.basename(path)  # pytest names folders after tests
    if "hang" in name:
        re.match(r"(a+)+$", "a" * 64 + "b")  # for ages, and holding the interpreter's lock
    if "crash" in name:
        ctypes.string_at(0)
    if "greedy" in name:
        np.ones(3 << 30, np.uint8)
    if "bug" in name:
        raise KeyError("ours")
    return honest_probe(path, limits)


def read_frames(path: str, found: media.Probe, pts: list[int], decoder: str) -> tuple[np.ndarray, str]:
    """Crash where decord is asked."""
    if "decord_dies" in os.path.basename(path) and decoder == "decord":
        ctypes.string_at(0)
    return honest_frames(path, found, pts, decoder)


media.probe, media.read_frames = probe, read_frames
decode_child.main(sys.argv[1:])
