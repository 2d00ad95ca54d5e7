"""What `jobs/prepare.py` takes. Defaults are the small world's run on two CPU cores."""

import math
from dataclasses import dataclass, field
from typing import Literal

from raydistill.config.checks import at_least, clip_size
from raydistill.config.grid import GridConfig
from raydistill.errors import InvalidValue

BLOCK_GIB = 1.0
"""Largest shard of decoded clips, which travels between machines in one piece."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the media files are, and their captions."""

    kind: Literal["sprites", "sprite_images", "videos", "images", "trajectories"] = "sprites"
    """`videos`, `images`: a folder of your own; `sprites`, `sprite_images`: draw the small world's clips, or
    single frames of other scenes, into `path` first; `trajectories`: record a teacher's paths for the
    captions of the latents artifact at `path`, see `record`."""
    path: str = "build/world"
    """Folder, searched recursively. Every machine of the cluster must see it under this path."""
    captions: str = ""
    """JSON-lines file with "file" and "caption" in each line; empty: a .json or .txt beside each file."""
    caption_policy: Literal["filter", "error", "empty"] = "filter"
    """A file without caption is left out and counted, stops the job, or gets the empty caption."""
    num_clips: int = 1500
    """How many clips or images of the small world to draw. Sprites only."""
    size: int = 32
    """Side of the small world's frames in pixels, a multiple of 32: the same scenes, drawn finer. They are
    then scaled to clip.height and clip.width like any video. Sprites only."""
    severity: float = 0.0
    """How poor the small world's clips are, in [0, 1]: exposure, blur, noise, watermark, compression.
    Sprites of size 32 only."""
    seed: int = 0
    """Seed of the small world. Sprites only."""

    def __post_init__(self):
        """Check ranges."""
        at_least("source.num_clips", self.num_clips, 1)
        at_least("source.seed", self.seed, 0)
        clip_size("source.size", self.size)
        if not 0.0 <= self.severity <= 1.0:
            raise InvalidValue("source.severity", self.severity, "in [0, 1]")
        if self.severity and self.size != 32:
            raise InvalidValue(
                "source.severity", self.severity, f"0 at source.size = {self.size}, or size 32"
            )
        if not self.path:
            raise InvalidValue("source.path", self.path, "a folder")

    @property
    def lane(self) -> str:
        """'video' or 'image'."""
        return "image" if self.kind in ("images", "sprite_images") else "video"


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What is cut from each file."""

    num_frames: int = 16
    """Frames of a clip. Codecs that compress time by k want 1 more than a multiple of k (Wan 2.1: 81)."""
    out_fps: float = 8.0
    """Frames per second of a clip; frames are picked by their time, whatever the video's own rate."""
    height: int = 32
    """Pixels; frames are scaled to cover (height, width), then their centre is cropped."""
    width: int = 32
    """Pixels."""
    stride_s: float = 0.0
    """Seconds from one clip's start to the next; 0: without gap or overlap."""
    max_clips_per_video: int = 1
    """At most so many clips of one video, spread evenly over it."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_frames", "height", "width", "max_clips_per_video"):
            at_least(f"clip.{name}", getattr(self, name), 1)
        if not 0 < self.out_fps <= 1000:
            raise InvalidValue("clip.out_fps", self.out_fps, "in (0, 1000]")
        at_least("clip.stride_s", self.stride_s, 0)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one file may ask for. A file beyond goes to quarantine as too_large, or timeout, or oom."""

    max_bytes: int = 4 * 2**30
    """File size, in bytes."""
    max_duration_s: float = 3600.0
    """Length of a video, in seconds."""
    max_pixels: int = 4096 * 2304
    """Width times height of a frame or picture."""
    max_packets: int = 500_000
    """Frames of a video."""
    deadline_s: float = 60.0
    """Seconds for one clip's decoding, after which the decoder is killed. Not part of the fingerprint; files
    in quarantine as timeout, oom or crash are tried again by a run with a longer deadline or more memory."""
    memory_gib: float = 4.0
    """Address space of a decode child, in GiB. Not part of the fingerprint."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("max_bytes", "max_duration_s", "max_pixels", "max_packets"):
            at_least(f"limits.{name}", getattr(self, name), 1)
        at_least("limits.deadline_s", self.deadline_s, 0.1)
        at_least("limits.memory_gib", self.memory_gib, 0.5)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The pool of decoders. Nothing here is part of the fingerprint."""

    num_actors: int = 1
    """Decoders at work at the same time, each with one child process."""
    cpus_per_actor: float = 1.0
    """Logical CPUs that Ray reserves for each."""
    recycle_after: int = 2000
    """Requests after which a decode child is replaced, so that a leak stays small."""
    audit_every: int = 100
    """One in so many videos is decoded by decord and PyAV, and the frames compared; 0: none."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_actors", "recycle_after"):
            at_least(f"decode.{name}", getattr(self, name), 1)
        at_least("decode.audit_every", self.audit_every, 0)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The pool of encoders: codec and text encoder."""

    codec: str = "raydistill/world/weights/codec"
    """The codec, safetensors: a folder of diffusers' autoencoder or pipeline, or a pipeline's name on the
    hub."""
    text: str = ""
    """Pipeline whose text encoders embed the captions, a folder or a name on the hub; empty: fixed word
    vectors, which only the small world's teachers know."""
    text_length: int = 0
    """Tokens of a caption by `text`; 0: as the pipeline has it (Wan 512, HunyuanVideo 256, CogVideoX 226)."""
    text_precision: Literal["fp32", "bf16"] = "fp32"
    """Of `text`'s encoders."""
    text_tokens: int = 8
    """Length of a caption's embedding by word vectors."""
    text_width: int = 32
    """Width of a caption's embedding by word vectors."""
    dtype: Literal["float32", "float16"] = "float32"
    """How latents are stored; readers always get float32."""
    batch_size: int = 16
    """Clips encoded at once. Not part of the fingerprint."""
    num_actors: int = 1
    """Encoders at work at the same time. Not part of the fingerprint."""
    cpus_per_actor: float = 1.0
    """Logical CPUs that Ray reserves for each. Not part of the fingerprint."""
    gpus_per_actor: float = 0.0
    """GPUs that Ray reserves for each; 0 encodes on the CPU. Not part of the fingerprint."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("text_tokens", "text_width", "batch_size", "num_actors"):
            at_least(f"encode.{name}", getattr(self, name), 1)
        at_least("encode.gpus_per_actor", self.gpus_per_actor, 0)
        at_least("encode.text_length", self.text_length, 0)


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Paths of a teacher, recorded ahead: training on them needs no pass of the teacher."""

    teacher: str = "raydistill/world/weights/teacher"
    """The teacher, as jobs/distill.py takes it."""
    num_paths: int = 1024
    """How many paths; path i has the caption of row i, again from the first when they are used up."""
    guidance_range: tuple[float, float] = (2.0, 2.0)
    """Lowest and highest guidance scale w, drawn for each path. A run must ask for the same."""
    grid: GridConfig = field(default_factory=GridConfig)
    """Nodes at which the path's states are kept. A run must have the same grid."""
    seed: int = 0
    """Keys noise and guidance with the path's number."""
    paths_per_shard: int = 16
    """A shard is what a stopped run has to do again, and what a recorder holds in memory, with all nodes."""
    dtype: Literal["float32", "float16"] = "float32"
    """How states are stored; readers always get float32."""
    batch_size: int = 16
    """Paths followed at once. Not part of the fingerprint."""
    num_actors: int = 1
    """Recorders at work at the same time. Not part of the fingerprint."""
    cpus_per_actor: float = 1.0
    """Logical CPUs that Ray reserves for each. Not part of the fingerprint."""
    gpus_per_actor: float = 0.0
    """GPUs that Ray reserves for each. Not part of the fingerprint."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_paths", "paths_per_shard", "batch_size", "num_actors"):
            at_least(f"record.{name}", getattr(self, name), 1)
        at_least("record.seed", self.seed, 0)
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise InvalidValue("record.guidance_range", self.guidance_range, "0 <= lowest <= highest")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How the artifact is divided. A shard is what a stopped run has to do again."""

    files_per_shard: int = 64
    """Most input files of one shard; on average it has two thirds of them."""
    rows_per_group: int = 4
    """Rows that a reader has to fetch together; few make random reads fast."""

    def __post_init__(self):
        """Check ranges."""
        at_least("shard.files_per_shard", self.files_per_shard, 1)
        if not 1 <= self.rows_per_group <= 64:
            raise InvalidValue("shard.rows_per_group", self.rows_per_group, "1 to 64")


@dataclass(frozen=True, kw_only=True)
class ToleranceConfig:
    """When bad files stop the job."""

    max_bad_fraction: float = 0.05
    """Share of quarantined files above which something is wrong with all of them; 1 never stops."""
    allowed_bad_files: int = 1
    """So many quarantined files never stop the job by their share, which in a small folder is soon large."""
    max_bad_in_a_row: int = 100
    """So many quarantined files one after the other stop the job at once."""

    def __post_init__(self):
        """Check ranges."""
        if not 0 <= self.max_bad_fraction <= 1:
            raise InvalidValue("tolerance.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        at_least("tolerance.allowed_bad_files", self.allowed_bad_files, 0)
        at_least("tolerance.max_bad_in_a_row", self.max_bad_in_a_row, 1)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The Ray that the job starts when it is not running inside one."""

    num_cpus: int = 0
    """Logical CPUs; 0: as many as the machine has."""
    object_store_mib: int = 0
    """Shared memory for data between processes, in MiB, 80 or more; 0: as Ray sees fit, 30 % of it all."""

    def __post_init__(self):
        """Check ranges."""
        at_least("cluster.num_cpus", self.num_cpus, 0)
        if self.object_store_mib:
            at_least("cluster.object_store_mib", self.object_store_mib, 80)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Media files become fingerprinted latents. Run again after a stop: finished shards are kept."""

    output: str = "build/latents"
    """Folder of artifacts; `latents.json` in it names the subfolder made last. Other settings or inputs make
    another subfolder, which shares unchanged shards with earlier ones; those may be removed."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Media files and captions."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Frames, rate and size."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Caps per file."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoders."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """Codec and text."""
    shard: ShardConfig = field(default_factory=ShardConfig)
    """Division into files."""
    tolerance: ToleranceConfig = field(default_factory=ToleranceConfig)
    """Bad files."""
    record: RecordConfig = field(default_factory=RecordConfig)
    """Recording of a teacher's paths, with source.kind=trajectories; clips and files do not matter then."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray, if none is running."""

    def __post_init__(self):
        """Check what no single section can see."""
        if not self.output:
            raise InvalidValue("output", self.output, "a folder")
        frames = 1 if self.source.lane == "image" else self.clip.num_frames * self.clip.max_clips_per_video
        clips_gib = self.shard.files_per_shard * frames * self.clip.height * self.clip.width * 3 / 2**30
        if clips_gib > BLOCK_GIB:
            size = f"decoded, a shard would take {clips_gib:.1f} GiB, {BLOCK_GIB:g} is the limit"
            hint = "lower it, or clip.max_clips_per_video, height, width"
            raise InvalidValue("shard.files_per_shard", self.shard.files_per_shard, f"{size}: {hint}")
        store, needed = self.cluster.object_store_mib, math.ceil(2 * 1024 * clips_gib)
        if 0 < store < needed:
            expected = f"0, or at least {needed}: two decoded shards"
            raise InvalidValue("cluster.object_store_mib", store, expected)
