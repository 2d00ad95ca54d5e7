"""The prepare job as tests call it, and what they look at while and after it runs."""

import importlib.util
import os
import time
from pathlib import Path

from raydistill.artifacts import Manifest
from raydistill.config.load import from_command_line
from raydistill.config.prepare import PrepareConfig

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("prepare_job", ROOT / "jobs" / "prepare.py")
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


def sprites(clips: Path) -> list[str]:
    return [f"source.path={clips}", "source.num_clips=40", "shard.files_per_shard=2"]


def settings(codec: Path, output: Path, *pairs: str) -> list[str]:
    return [f"encode.codec={codec}", f"output={output}", *pairs]


def prepare(codec: Path, output: Path, *pairs: str) -> Path:
    return job.prepare(from_command_line(PrepareConfig, settings(codec, output, *pairs))[0])


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of every shard."""
    manifests = {p: Manifest.read(p) for p in folder.glob("*-*.manifest.json")}
    return {
        name: ((folder / name).stat().st_mtime_ns, entry["rows_digest"])
        for manifest in manifests.values()
        for name, entry in manifest.files.items()
    }


def descendants(pid: int) -> dict[int, str]:
    """Processes below a process, with their command lines."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        for child in [c for c, p in parents.items() if p == parent]:
            todo.append(child)
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def actors_after(shards: int, output: Path, name: str) -> dict[int, str]:
    """Return this Ray's actors by a part of their title, once there are some and so many shards committed."""
    deadline, found = time.monotonic() + 200, dict[int, str]()
    while not found and time.monotonic() < deadline:
        time.sleep(0.01)
        if len(list(output.glob("*/*-*.manifest.json"))) >= shards:
            found = {pid: words for pid, words in descendants(os.getpid()).items() if name in words}
    return found
