"""What a run reads: artifacts of clips, images and recorded paths, by the settings that name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raydistill.artifacts import LatentStore
from raydistill.config.distill import DistillConfig
from raydistill.errors import ArtifactError
from raydistill.trajectories.store import TrajectoryStore


@contextmanager
def named(key: str, how: str) -> Iterator[None]:
    """Say which setting names what is not there, or is something else, and what would make it."""
    try:
        yield
    except ArtifactError as error:
        error.add_note(f"{key}= names a folder that jobs/prepare.py {how}")
        raise


@dataclass(frozen=True)
class Stores:
    """What a run reads: clips, and images and recorded paths where it asks for them."""

    video: LatentStore
    images: LatentStore | None = None
    recorded: TrajectoryStore | None = None

    @staticmethod
    def open(config: DistillConfig) -> "Stores":
        """Open them. Raises MissingArtifact, CorruptArtifact."""
        paths = config.mix.trajectories
        with named("data", "makes of clips"):
            video = LatentStore(config.data)
        with named("images", "with source.kind=images makes"):
            images = LatentStore(config.images) if config.images else None
        with named("mix.trajectories", "with source.kind=trajectories makes"):
            return Stores(video, images, TrajectoryStore(paths) if paths else None)

    @property
    def digests(self) -> dict[str, str]:
        """Fingerprints of the contents."""
        every = {"latents": self.video, "images": self.images, "trajectories": self.recorded}
        return {name: store.fingerprint for name, store in every.items() if store is not None}

    @property
    def folders(self) -> dict[str, Path]:
        """Where the lanes of a plan are read."""
        every = {"image": self.images, "recorded": self.recorded}
        found = {lane: store.folder for lane, store in every.items() if store is not None}
        return {"video": self.video.folder, "simulated": self.video.folder, **found}

    def summary(self, config: DistillConfig) -> str:
        """How much there is, and a line where an image critic would see an image twice in a step."""
        found = [f"{len(self.video)} clips"]
        if self.images:
            found.append(f"{min(len(self.images), config.max_images or len(self.images))} images")
        if self.recorded:
            found.append(f"{len(self.recorded)} recorded paths")
        lines = [f"reading {', '.join(found)}"]
        for name in config.stages:
            stage = config.stage(name)
            asked = stage.appearance.images_per_step if stage.objective.appearance else 0
            if self.images and len(self.images) < asked:
                lines.append(f"warning: {name}.appearance.images_per_step={asked}: a step sees images twice")
        return "\n".join(lines)
