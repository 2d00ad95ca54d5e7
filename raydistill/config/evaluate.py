"""What `jobs/evaluate.py` takes. Defaults are the small world's run on two CPU cores."""

import re
from dataclasses import dataclass, field
from typing import Literal

from raydistill.config.checks import clip_size
from raydistill.errors import InvalidValue

SWITCHES = {"update-readme": "put the table into README.md and the pictures into docs/"}


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """What the report shows of the clips."""

    captions: int = 6
    """Captions in the moving pictures; fewer are taken when the file would be too large."""
    strip_captions: int = 3
    """Captions in the strips of frames."""
    beside: dict[str, str] = field(default_factory=dict[str, str])
    """Label -> latents of jobs/prepare.py of which the first are shown below the strips, decoded: what was
    trained on. What is not there is left out, and said."""
    limit_kib: int = 900
    """Largest size of the GIF; all pictures that --update-readme copies stay under 1.5 MiB together."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("captions", "strip_captions"):
            _at_least(f"pictures.{name}", getattr(self, name), 1)
        if not 100 <= self.limit_kib <= 1200:
            raise InvalidValue("pictures.limit_kib", self.limit_kib, "between 100 and 1200")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Seconds per clip, all samplers in turn in one process: fair ratios even on a busy machine."""

    rounds: int = 5
    """How often each sampler is timed, after a warm-up; the median counts. 0 leaves latency out."""
    batches: tuple[int, ...] = (1, 16)
    """Clips per call. The first is timed for every sampler, the others for the teacher's best and 4 steps:
    with one clip a small network is all overhead, and says little of a large one."""
    threads: int = 1
    """Torch threads while timing; more make a small network's calls wait for one another."""

    def __post_init__(self):
        """Check ranges."""
        _at_least("latency.rounds", self.rounds, 0)
        _at_least("latency.threads", self.threads, 1)
        if not self.batches or min(self.batches) < 1:
            raise InvalidValue(
                "latency.batches", self.batches, "one or more numbers of clips, each at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Quality against steps: teacher, students and their mixtures, on captions that no training saw."""

    data: str = ""
    """Latents of jobs/prepare.py, of clips and captions that no training saw: a real teacher and its students
    are measured on these. Empty: the small world, which draws its own."""
    teacher: str = "raydistill/world/weights/teacher"
    """Folder of the many-step model, or a pipeline's, or its name on the hub."""
    more_teachers: dict[str, str] = field(default_factory=dict[str, str])
    """Name, as teacher_NAME -> folder of another teacher with the same codec: it has rows of its own, and its
    students are compared with it."""
    codec: str = "raydistill/world/weights/codec"
    """Folder of the codec that both were trained with, or a pipeline's, or its name on the hub."""
    judge: str = "raydistill/world/weights/judge"
    """Folder of the network that reads attributes off a clip; if it is not there, its figures are skipped.
    The small world's alone."""
    features: str = ""
    """With data: local folder of a network for figures, as transformers saves it, safetensors only: a whole
    CLIP with its tokenizer (Frechet distance, likeness of captions), a CLIP's vision part or a DINOv2 (the
    distance). Nothing is downloaded; if it is not there, its figures are skipped."""
    features_digest: str = ""
    """Digest that the files of features must have, as results.json has it; empty: any, which is recorded."""
    students: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Kind -> students of that kind, one per training seed, averaged; e.g. students.dual=[build/a,build/b].
    `dual` and `single` are the names the verdicts look for. What is not there is skipped, with the reason."""
    strict: bool = False
    """Raise instead of skipping when a student, the judge, or what features names is not there."""
    output: str = "build/evaluation"
    """Receives report.html, report/, results.json and records/, from which a second run goes on."""
    records: str = ""
    """Folder of the records, if not that: evaluations that share it measure a sampler once."""
    num_clips: int = 144
    """Clips per sampler. 144 fits in about 90 seconds; intervals for a README want 576 or more. Of data the
    first so many."""
    reference_clips: int = 1152
    """Real clips that the Frechet distance is taken to. Of data at most so many of those after num_clips."""
    size: int = 32
    """Side of the clips in pixels, a multiple of 32, as the networks were trained on. All that is
    measured of pixels, but for PSNR, is measured on clips averaged down to 32x32, and so comparable between
    sizes; pictures show every pixel."""
    seed: int = 2024
    """Keys noise and real clips; not a training seed."""
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2, 1)
    """Step counts of the guided teacher; the first is what students are compared with."""
    student_steps: tuple[int, ...] = (8, 4, 2, 1)
    """Step counts of every student; those its plan cannot do are skipped."""
    paths: tuple[Literal["stored", "deterministic", "renoise"], ...] = ("stored",)
    """How students follow their plans: as stored with them, or as said here; each has its own rows."""
    semantic_tail: tuple[int, ...] = (2,)
    """Steps of the semantic expert, after which the guided teacher finishes."""
    head_detail: tuple[int, ...] = (2,)
    """Steps of the detail expert, after the guided teacher went down to the boundary."""
    guidance_scale: float = 2.0
    """The teacher's w in uncond + w (cond - uncond); 1 is off."""
    guidance_scale_2: float = 0.0
    """That of the second of a teacher's two networks (Wan2.2); 0: the same."""
    shift: float = 1.0
    """Warp of the teacher's times towards noise; 1 is none."""
    batch_size: int = 48
    """Clips sampled at once."""
    device: str = "cpu"
    """Where networks compute: cpu, cuda, cuda:1. The small world's on the CPU alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights of teacher and students; the state of sampling and the codec stay float32."""
    num_draws: int = 400
    """Bootstrap resamplings behind each 95 % interval."""
    threads: int = 2
    """Torch threads. On a machine that others use, 1 is many times faster than 2 that wait for each other."""
    metrics: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> metrics.jsonl of a training run whose loss curves the report shows."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """Timing."""
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    """Strips and moving pictures."""
    readme_section: str = "table"
    """Where --update-readme puts the table: between <!-- NAME:begin --> and <!-- NAME:end -->; the pictures
    go to docs/, of any other section than `table` to docs/NAME/."""

    def __post_init__(self):
        """Check ranges."""
        _at_least("num_clips", self.num_clips, 4)
        _at_least("reference_clips", self.reference_clips, 4)
        _at_least("num_draws", self.num_draws, 20)
        clip_size("size", self.size)
        for name in ("batch_size", "threads"):
            _at_least(name, getattr(self, name), 1)
        _at_least("guidance_scale", self.guidance_scale, 0)
        if not 0 < self.shift < float("inf"):
            raise InvalidValue("shift", self.shift, "a positive number")
        for name in ("teacher_steps", "student_steps", "semantic_tail", "head_detail"):
            counts = getattr(self, name)
            if any(count < 1 for count in counts) or len(set(counts)) < len(counts):
                raise InvalidValue(name, counts, "different step counts, each at least 1")
        if not re.fullmatch("[a-z]+", self.readme_section):
            raise InvalidValue("readme_section", self.readme_section, "a name of a-z")
        self._check_names()
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuse what would have no effect."""
        _at_least("guidance_scale_2", self.guidance_scale_2, 0)
        if not self.data:
            for name in ("features", "device", "precision", "guidance_scale_2"):
                if (value := getattr(self, name)) != (plain := getattr(type(self), name)):
                    raise InvalidValue(name, value, f"{plain!r} without data: it is for real teachers")
        elif self.judge != type(self).judge:
            raise InvalidValue("judge", self.judge, "left out with data: it knows the small world alone")
        elif self.size != 32:
            raise InvalidValue(
                "size", self.size, "32 with data: clips have the size that they were prepared in"
            )
        if self.features_digest and not self.features:
            raise InvalidValue("features_digest", self.features_digest, "empty without features")

    def _check_names(self) -> None:
        for kind in self.students:
            if not re.fullmatch("(?!teacher(_|$))[a-z0-9_]+", kind):
                raise InvalidValue("students", kind, "a name of a-z, 0-9, _; teachers have their own fields")
        for name in self.more_teachers:
            if not re.fullmatch("teacher_[a-z0-9_]+", name):
                raise InvalidValue("more_teachers", name, "teacher_ and a-z, 0-9, _")


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise InvalidValue(key, value, f"at least {low}")
