"""What `jobs/export.py` takes. Defaults are the small world's run on two CPU cores."""

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from omegaconf import MISSING

from raydistill.config.checks import at_least
from raydistill.errors import InvalidValue, MissingValue

LICENSE = "[a-z0-9][a-z0-9.-]*"
EFFECTIVE = {
    "output": ("sizes", "teacher_steps", "default_plan", "text"),
    "pipeline": ("pipeline_plan", "pipeline_path", "license"),
}
"""Settings that say something of one of the two folders."""
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A student as one folder that a server loads, and of a real teacher's as a pipeline of diffusers."""

    student: str = MISSING
    """Folder of the student, as jobs/distill.py left it: <output>/student."""
    codec: str = ""
    """Codec that the student was distilled with, a folder or a name on the hub. Empty: that of teacher, where
    that is a pipeline; otherwise the small world's."""
    teacher: str = ""
    """Folder of the student's teacher: copied if a plan with its tail or a motion student needs it. Without,
    such plans are left out."""
    teacher_steps: tuple[int, ...] = ()
    """Also offer the teacher itself with so many steps, as plans `teacher50` ...: what the student stands in
    for, to compare with. Needs teacher."""
    output: str = ""
    """Bundle to write, for the server; empty: none. The bundle that is there already is left as it is;
    another is never overwritten."""
    pipeline: str = ""
    """Folder to write for diffusers, which loads it without this package: the teacher's pipeline with the
    student in it, a scheduler with its times, a LoRA for ComfyUI where it is one, a model card. Needs
    teacher, the folder or the hub name of a whole pipeline; empty: none."""
    pipeline_plan: str = ""
    """Plan whose times the pipeline has. Empty: 4 if there is such a plan, else that of most steps."""
    pipeline_path: Literal["", "deterministic", "renoise"] = ""
    """The way between that plan's times, see sampling.path of jobs/distill.py. Empty: the plan's own; of two
    experts diffusers can go deterministic alone."""
    license: str = ""
    """Licence of the exported weights for the model card, as the hub abbreviates it, apache-2.0."""
    device: str = "cpu"
    """Where the bundle's preview map is fitted, to six clips that the student makes: cpu, cuda."""
    preview: bool = True
    """Fit it. Without, worker.previews=linear cannot be asked of the server."""
    text: str = ""
    """Pipeline with the text encoder of a real teacher's captions, for the bundle. Empty: the teacher's."""
    name: str = ""
    """Under which it is served: letters, digits, '.', '_', '-', at most 64. Empty: the name of the folder
    written, or of the folder above it if that is called bundle or pipeline."""
    fps: int = 8
    """Frames per second of its videos."""
    sizes: tuple[tuple[int, int, int], ...] = ()
    """Further (frames, height, width) that requests may ask for, in pixels. The student was trained on one
    size: look at what it makes of another before you list it."""
    scores: str = ""
    """Output folder of jobs/evaluate.py: what it measured of this student is written on the bundle's card."""
    default_plan: str = ""
    """Plan of a request that names none. Empty: 4 if there is such a plan, else the one of most steps."""

    def __post_init__(self):
        """Check what can be checked without reading files."""
        at_least("fps", self.fps, 1)
        self._check_targets()
        for size in self.sizes:
            require_size(size)
        for steps in self.teacher_steps:
            at_least("teacher_steps", steps, 1)
        if self.teacher_steps and not self.teacher:
            raise MissingValue("teacher", "plans of the teacher were asked for: name its folder")
        if self.name:
            require_name(self.name)

    def _check_targets(self):
        """What is written, and settings of what is not."""
        if not self.output and not self.pipeline:
            raise MissingValue("output", "nothing to write: a folder for the bundle, or pipeline=FOLDER")
        if self.pipeline and not self.teacher:
            raise MissingValue("teacher", "its pipeline's codec and text encoder are part of what is written")
        if self.license and not re.fullmatch(LICENSE, self.license):
            raise InvalidValue(
                "license", self.license, "an identifier of the hub, such as apache-2.0 or other"
            )
        for target, keys in EFFECTIVE.items():
            for key in keys:
                if (value := getattr(self, key)) and not getattr(self, target):
                    raise InvalidValue(key, value, f"left out without {target}, which it is about")

    @property
    def bundle_name(self) -> str:
        """Name under which it is served."""
        folder = PurePath(self.output or self.pipeline)
        return self.name or (folder.parent.name if folder.name in ("bundle", "pipeline") else folder.name)


def require_name(name: str) -> None:
    """Raise InvalidValue unless requests, file names and addresses can hold the name of a bundle."""
    if not re.fullmatch(NAME, name):
        raise InvalidValue(
            "name", name, "letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
        )


def require_size(size: tuple[int, int, int]) -> None:
    """Raise InvalidValue unless these are positive frames, height and width."""
    if len(size) != 3 or min(size) < 1:  # nobody counts what is nested in a setting
        raise InvalidValue("sizes", list(size), "frames, height and width, each at least 1")
