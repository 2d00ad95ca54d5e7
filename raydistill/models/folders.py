"""Where a model lies: a folder of diffusers, a whole pipeline's folder, or the name of one on the hub."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydistill.artifacts import commit_file, file_sha256, fingerprint
from raydistill.errors import InvalidValue, MissingArtifact

INDEX = "model_index.json"
CONFIG = "config.json"
NETWORKS = ("transformer", "transformer_2", "unet", "unet_2")
"""A pipeline's denoising networks; Wan2.2 has two, and so has what was exported of two experts."""
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")


def located(name: str | Path, parts: Sequence[str] = (), *, weights: bool = True) -> Path:
    """Return the folder of a model: `name` itself, or the hub's snapshot of it, only these parts of it.

    Without `weights` nothing but configs is fetched. The hub is asked where there is no such folder and the
    name is of the form 'owner/model'; with HF_HUB_OFFLINE=1 only its cache is. Raises MissingArtifact.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    if not HUB_NAME.fullmatch(str(name)):
        raise MissingArtifact(f"no model at {folder.absolute()}: name its folder, or a pipeline of the hub")
    from huggingface_hub import snapshot_download  # only here: it costs half a second

    wanted = ["*.json", *(f"{part}/*" for part in (*parts, "scheduler"))] if parts and weights else None
    wanted = wanted if weights else ["*.json"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=list(PICKLES)))
    except Exception as failed:  # of many kinds: the network's, the hub's, its cache's
        raise MissingArtifact(
            f"no folder {folder.absolute()}, and '{name}' cannot be had from the hub: {failed}"
        ) from failed


def read_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline's own list of its parts; empty for the folder of a single model."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as broken:
        raise MissingArtifact(f"{folder / INDEX} is not a pipeline's index: {broken}") from broken
    if not isinstance(index, dict) or "_class_name" not in index:
        raise MissingArtifact(f"{folder / INDEX} names no pipeline")
    return index


def network_folders(name: str | Path, *, weights: bool = False) -> tuple[Path, ...]:
    """Return the folders of a teacher's networks: one, or two where its pipeline has a pair.

    From the hub come their configs, and with `weights` all. Raises MissingArtifact for a pipeline without,
    InvalidValue for a variant that is not known, and what `located` raises.
    """
    folder = located(name, NETWORKS, weights=weights)
    if not (index := read_index(folder)):
        return (folder,)
    if index.get("expand_timesteps"):
        raise InvalidValue(
            "expand_timesteps", True, "false: Wan2.2's TI2V, a time for each token, is not known"
        )
    found = tuple(folder / part for part in NETWORKS if (folder / part / CONFIG).is_file())
    if not found:
        raise MissingArtifact(f"{folder} is a {index['_class_name']} without {', '.join(NETWORKS)}")
    return found


def boundary_ratio(name: str | Path) -> float | None:
    """Time below which a pipeline's second network takes over, in (0, 1); None with one network."""
    if len(network_folders(name)) < 2:
        return None
    folder = located(name, NETWORKS, weights=False)
    ratio = read_index(folder).get("boundary_ratio")
    if not isinstance(ratio, float) or not 0.0 < ratio < 1.0:
        raise MissingArtifact(
            f"{folder / INDEX}: boundary_ratio = {ratio!r}, but two networks share the path at a time in "
            "(0, 1): copy the pipeline again"
        )
    return ratio


def part_folder(name: str | Path, part: str, *, weights: bool = True) -> Path:
    """Return the folder of a pipeline's part, such as 'vae'; `name` itself if it is no pipeline."""
    folder = located(name, (part,), weights=weights)
    if not (index := read_index(folder)):
        return folder
    if not (folder / part).is_dir():
        raise MissingArtifact(f"{folder} is a {index['_class_name']} without its {part}")
    return folder / part


def teacher_digest(name: str | Path) -> str:
    """Return what stands for a teacher's networks in fingerprints: their contents, not where they lie."""
    found = [model_digest(folder) for folder in network_folders(name, weights=True)]
    return found[0] if len(found) == 1 else fingerprint([*found, boundary_ratio(name)])


def codec_digest(name: str | Path) -> str:
    """Return what stands for a codec in fingerprints."""
    return model_digest(part_folder(name, "vae"))


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file's bytes and have the disk keep them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as theirs, open(target, "wb") as ours:
        shutil.copyfileobj(theirs, ours, 1 << 20)
    sync(target)


def sync(path: Path) -> None:
    """Have the disk keep a file or a folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def files_of(folder: Path) -> list[str]:
    """Relative names of a model's files. Nobody reads pickled weights, nor what begins with a dot."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (path for path in found if not any(path.match(kind) for kind in PICKLES))
    return sorted(path.as_posix() for path in kept if not any(one.startswith(".") for one in path.parts))


def names_in(folder: Path, parts: Sequence[str]) -> list[str]:
    """Relative names of a model's files: of a pipeline its index and these parts, else all."""
    names = files_of(folder)
    if not read_index(folder):
        return names
    return [name for name in names if name == INDEX or name.partition("/")[0] in parts]


def require_whole(folder: Path) -> None:
    """Check that every part which a pipeline's index names is there, a model with all of its safetensors.

    Raises MissingArtifact.
    """
    for part, value in read_index(folder).items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        names = files_of(folder / part) if (folder / part).is_dir() else []
        if not names:
            raise MissingArtifact(f"{folder / INDEX} names {part}, of which nothing is there: copy it too")
        shards = {name for name in names if name.endswith(".safetensors")}
        for listed in (name for name in names if name.endswith(".safetensors.index.json")):
            wanted = set(json.loads((folder / part / listed).read_bytes())["weight_map"].values())
            if lost := sorted(wanted - shards):
                raise MissingArtifact(f"{folder / part} lacks {', '.join(lost)}: copy it again")
        if CONFIG in names and not shards:
            raise MissingArtifact(
                f"{folder / part} has no safetensors weights: convert them, pickled ones are never read"
            )


def model_digest(folder: Path) -> str:
    """Return one sha256 over the names and contents of a model's files. Raises MissingArtifact for none."""
    if not (names := files_of(folder)):
        raise MissingArtifact(f"{folder}: no files of a model there")
    return fingerprint({name: file_sha256(folder / name) for name in names})


@contextmanager
def built_beside(output: Path) -> Generator[Path, None, None]:
    """Give a folder to fill that becomes `output` at the end: whole, or not there at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.iterdir():  # of a run that was killed
        if re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}\.part", left.name):
            shutil.rmtree(left, ignore_errors=True)
    beside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        beside.mkdir()
        yield beside
        for path in beside.rglob("*"):
            sync(path)
        commit_file(beside, output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
