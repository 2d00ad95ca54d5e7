"""What `jobs/distill.py` takes. Defaults are the small world's run on two CPU cores."""

from dataclasses import dataclass, field
from typing import Any, Literal

from raydistill.config.checks import at_least, fraction, positive
from raydistill.config.grid import GridConfig
from raydistill.config.plan import PlanConfig
from raydistill.config.stages import DetailConfig, MotionConfig, SemanticConfig, StageConfig
from raydistill.errors import InvalidValue

SWITCHES = {
    "plan": "say what each stage takes: memory by role, passes, operations, hours, money; loads no weights",
    "analyse": "draw loss, gradient and x0 change by noise level for this teacher, and propose a boundary",
}


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The slow network that gives the goal, theta^-. It is the student's, never the teacher's."""

    kind: Literal["online", "ema"] = "ema"
    """`online`: the student itself without gradients (DCM's code); `ema`: its moving average (DCM's text)."""
    decay: float = 0.95
    """Decay of the moving average per optimizer step, in [0, 1); at step n at most (1 + n) / (10 + n).
    Unused when online."""

    def __post_init__(self):
        """Check ranges."""
        fraction("target.decay", self.decay)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Kernel of attention by role: a name that diffusers' `set_attention_backend` knows.

    `native` sets nothing: torch chooses, or DIFFUSERS_ATTN_BACKEND. U-Nets and CogVideoX have no other.
    HunyuanVideo masks its captions: kernels that take no mask stop at the first step. Two kernels differ by
    rounding.
    """

    student: str = "native"
    """Of the student, and of the goal where target.kind = online. Kernels without a backward pass, such as
    SageAttention's, are refused."""
    frozen: str = "native"
    """Of the teacher, and of the moving average that gives the goal. Kernels without a backward pass are
    refused where a token critic looks through the teacher."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How gradients move between machines; DeepSpeed's own JSON is derived from it."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain reference: same numbers, no sharding, every worker holds everything."""
    zero_stage: int = 2
    """What ZeRO shards over workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights. Of the
    student and the critic, that is: the target and the moving averages of trained weights, in float32, are
    whole on every worker at any stage, and so is the teacher unless shard_teacher is set. At 3 the layer at
    work is whole, with at most 200 million weights fetched ahead, 50 million at a time, and those below a
    hundred thousand: limits that `extra` sets, as in zero_optimization.stage3_max_live_parameters."""
    shard_teacher: bool = False
    """Divide the frozen teacher over the workers, as ZeRO 3 does; a layer is whole on a worker for its pass
    alone. A student that is a LoRA needs zero_stage = 3 beside it: below, it shares the teacher's weights."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory. Needs zero_stage >= 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward of every network; master weights, moving averages and the exported student are
    float32 either way."""
    activation_checkpointing: bool = False
    """Recompute the student's activations in the backward pass: less memory, about a third more time."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Kernels of attention."""
    compile_frozen: bool = False
    """torch.compile of the blocks of the teacher, and of the moving average that gives the goal: once for
    each kind of call, at the first steps; on CPUs it needs a C++ compiler."""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Merged into DeepSpeed's JSON last, for what has no field here."""

    def __post_init__(self):
        """Check ranges."""
        if self.zero_stage not in range(4):
            raise InvalidValue("engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise InvalidValue("engine.offload_optimizer", True, "needs engine.zero_stage >= 1")
        if self.backend == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            # Without sharding DeepSpeed adds bf16 gradients up in bf16.
            raise InvalidValue("engine.precision", "bf16", "needs engine.zero_stage >= 1")
        if self.backend == "torch" and self.offload_optimizer:
            raise InvalidValue("engine.offload_optimizer", True, "needs engine.backend = deepspeed")
        if self.shard_teacher and (self.backend == "torch" or self.compile_frozen):
            # Weights that come and go by hooks are not what a compiled block expects.
            raise InvalidValue(
                "engine.shard_teacher", True, "needs backend = deepspeed, compile_frozen = false"
            )


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Workers and what each of them gets."""

    num_workers: int = 2
    """Training processes; each holds one GPU, or some CPU cores."""
    cpus_per_worker: float = 0.5
    """Logical CPUs that Ray reserves per worker. Leave some for the data flow, or training never starts."""
    use_gpu: bool = False
    """One GPU per worker."""
    threads_per_worker: int = 1
    """Threads of torch in each worker."""
    max_failures: int = 3
    """Lost workers or machines to survive; every time training resumes from the newest good checkpoint."""

    def __post_init__(self):
        """Check ranges."""
        at_least("scale.num_workers", self.num_workers, 1)
        positive("scale.cpus_per_worker", self.cpus_per_worker)
        at_least("scale.threads_per_worker", self.threads_per_worker, 1)
        at_least("scale.max_failures", self.max_failures, 0)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where figures go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write event files under `<output>/tensorboard`."""
    wandb: str = ""
    """Weights & Biases project; empty is off."""
    mlflow: str = ""
    """MLflow experiment; empty is off."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Where the paths of training begin (MCM, sec. 3.3). With experts=motion or =single."""

    real_share: float = 1.0
    """Share of the samples whose x0 is a video's (MCM: 0.5). What this and recorded_share leave starts at the
    student's own one-step sample of the caption."""
    recorded_share: float = 0.0
    """Share of the samples that are read from paths of the teacher recorded ahead."""
    per: Literal["sample", "step"] = "sample"
    """Shares are kept among single samples, or whole steps have one kind, as in MCM's code."""
    trajectories: str = ""
    """Artifact of recorded paths: jobs/prepare.py with source.kind=trajectories makes one."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("real_share", "recorded_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidValue(f"mix.{name}", getattr(self, name), "in [0, 1]")
        if self.real_share + self.recorded_share > 1.0 + 1e-9:
            most = f"at most what mix.real_share = {self.real_share} leaves: both are shares of all samples"
            raise InvalidValue("mix.recorded_share", self.recorded_share, most)
        if bool(self.trajectories) != (self.recorded_share > 0):
            need = (
                "the artifact of recorded paths" if self.recorded_share else "empty: mix.recorded_share is 0"
            )
            raise InvalidValue("mix.trajectories", self.trajectories, need)

    @property
    def plain(self) -> bool:
        """Whether every sample is a video."""
        return self.real_share == 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Plans stored with the weights."""

    path: Literal["deterministic", "renoise"] = "renoise"
    """Jump straight on, or jump to the end of the phase and noise again."""
    num_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts to store a plan for."""
    semantic_tail: tuple[int, ...] = (2,)
    """Steps of a semantic expert after which the teacher finishes; 2 is stored as '2+tail'."""
    times: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Plans of your own by name: times from 1 to 0, one of them the boundary:
    sampling.times.mine=[1,0.86,0.74,0]."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_steps", "semantic_tail"):
            for count in getattr(self, name):
                at_least(f"sampling.{name}", count, 1)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A many-step teacher becomes a few-step student."""

    teacher: str = "raydistill/world/weights/teacher"
    """The frozen many-step model: a folder of diffusers' network or pipeline, or a pipeline's name on the
    hub. Of Wan2.2's two networks each expert is distilled from its own (experts=dual_full). Embedded
    guidance is detected."""
    codec: str = "raydistill/world/weights/codec"
    """Codec that made the latents, a folder of the codec or its pipeline, or a name on the hub; its
    fingerprint is compared with theirs."""
    data: str = "build/latents"
    """Latents artifact to train on."""
    images: str = ""
    """Latents artifact of good images for the image critic, with captions of their own."""
    max_images: int = 0
    """Use only so many of the images, the first rows; 0: all."""
    output: str = "build/student"
    """Run folder: checkpoints, metrics and, at the end, the student."""
    seed: int = 7
    """Keys every random number together with the global sample index."""
    experts: Literal["dual", "single", "dual_full", "motion"] = "dual"
    """`dual`: semantic + LoRA detail; `dual_full`: two whole networks; `single`: the semantic stage alone,
    over the whole range (a plain consistency model); `motion`: MCM's, a LoRA over the whole range."""
    boundary: float = 0.74
    """Time at which the semantic expert hands over, in (0, 1); it belongs to the detail expert."""
    grid: GridConfig = field(default_factory=GridConfig)
    """Times of the teacher's path."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the teacher, w in uncond + w (cond - uncond); 1 is off."""
    guidance_scale_2: float = 0.0
    """Guidance of the second network of a teacher that has two, by its name in Wan2.2's pipeline (published:
    4 and 3); 0: guidance_scale."""
    guidance_range: tuple[float, ...] = ()
    """Lowest and highest w, drawn for each sample (MCM's code says 5 to 15 and means 6 to 16, for it counts
    from 0); empty: guidance_scale for all."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """Network that gives the goal."""
    average_decay: float = 0.995
    """Decay of the moving average of the student that is kept as the result, in [0, 1); 0 keeps the last.
    At step n at most (1 + n) / (10 + n), so that a short run's average is not mostly its beginning: 0.995
    holds from step 1,790 on."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """First stage: t in (boundary, 1]."""
    detail: DetailConfig = field(default_factory=DetailConfig)
    """Second stage: t in (0, boundary]."""
    motion: MotionConfig = field(default_factory=MotionConfig)
    """The only stage of experts=motion: t in (grid.last, 1]."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Real, simulated and recorded paths."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """ZeRO, precision, memory."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Of --plan alone."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Loggers."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Plans stored with the student."""
    save_every: int = 100
    """Optimizer steps between checkpoints; the last step of a stage is always saved."""
    keep: int = 2
    """Newest checkpoints kept per stage."""
    report_every: int = 10
    """Optimizer steps between lines of metrics."""
    resume: bool = True
    """Continue from the newest good checkpoint under `output`; false refuses a folder that has any."""

    def __post_init__(self):
        """Check what no single section can see."""
        if not 0.0 < self.boundary < 1.0:
            raise InvalidValue("boundary", self.boundary, "in (0, 1)")
        if self.is_dual and not self.grid.last < self.boundary:
            raise InvalidValue("grid.last", self.grid.last, f"below boundary = {self.boundary}")
        fraction("average_decay", self.average_decay)
        for name in ("save_every", "keep", "report_every"):
            at_least(name, getattr(self, name), 1)
        at_least("max_images", self.max_images, 0)
        if self.max_images and not self.images:
            raise InvalidValue("max_images", self.max_images, "0 without images")
        self._check_guidance()
        if self.is_dual and not self.mix.plain:
            expected = "1 with two experts: a sample of one step is experts=motion's or =single's"
            raise InvalidValue("mix.real_share", self.mix.real_share, expected)
        self._check_terms()
        self._check_sharding()
        for name in self.stages:
            self._check_stage(name)

    def _check_guidance(self):
        """One scale, one for each of two networks, or a range."""
        low_high = self.guidance_range
        if low_high and not (len(low_high) == 2 and 0 <= low_high[0] <= low_high[1]):
            raise InvalidValue("guidance_range", low_high, "two numbers, 0 <= lowest <= highest, or empty")
        at_least("guidance_scale_2", self.guidance_scale_2, 0)
        if self.guidance_scale_2 and (low_high or self.experts != "dual_full"):
            expected = "0 but for experts=dual_full without guidance_range"
            raise InvalidValue("guidance_scale_2", self.guidance_scale_2, expected)

    @property
    def is_dual(self) -> bool:
        """Whether two experts share the path."""
        return self.experts in ("dual", "dual_full")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in the order of their training."""
        if self.experts == "motion":
            return ("motion",)
        return ("semantic", "detail") if self.is_dual else ("semantic",)

    def stage(self, name: str) -> StageConfig:
        """Settings of 'semantic', 'detail' or 'motion'."""
        return {"semantic": self.semantic, "detail": self.detail, "motion": self.motion}[name]

    def guidance_of(self, stage: str) -> float:
        """Guidance of a stage's teacher, where it is one for all samples."""
        return (self.guidance_scale_2 if stage == "detail" else 0) or self.guidance_scale

    def _check_sharding(self):
        """A LoRA below ZeRO 3 computes with the teacher's own weights, which then cannot be taken apart."""
        shares = self.experts == "motion" or self.semantic.lora_rank > 0
        if self.engine.shard_teacher and shares and self.engine.zero_stage < 3:
            expected = (
                "false: the LoRA student and its teacher hold their weights once; or engine.zero_stage = 3, "
                "which divides both"
            )
            raise InvalidValue("engine.shard_teacher", True, expected)

    def _check_terms(self):
        """Terms of the loss that a stage cannot have, or that need something."""
        for stage in ("semantic", "motion"):
            for name in ("adversarial", "feature_matching"):
                if weight := getattr(self.stage(stage).objective, name):
                    key = f"{stage}.objective.{name}"
                    raise InvalidValue(key, weight, "0: belongs to the detail expert")
        if self.is_dual and self.semantic.objective.appearance:
            key, weight = "semantic.objective.appearance", self.semantic.objective.appearance
            raise InvalidValue(key, weight, "0: its jumps end in noise, use detail.objective.appearance")
        judged = [name for name in self.stages if self.stage(name).objective.appearance]
        if judged and not self.images:
            expected = f"a folder that jobs/prepare.py made of images, or {judged[0]}.objective.appearance=0"
            raise InvalidValue("images", self.images, expected)
        if self.images and not judged:
            expected = (
                f"empty, or {self.stages[-1]}.objective.appearance above 0: nothing looks at the images"
            )
            raise InvalidValue("images", self.images, expected)

    def _check_stage(self, name: str):
        """Batch against workers; warm-up against length."""
        stage = self.stage(name)
        try:
            stage.accumulation(self.scale.num_workers)
        except InvalidValue as error:
            raise InvalidValue(f"{name}.{error.key}", error.value, error.expected) from None
        if stage.optimizer.warmup_steps > stage.num_steps:
            value, limit = stage.optimizer.warmup_steps, stage.num_steps
            raise InvalidValue(f"{name}.optimizer.warmup_steps", value, f"at most num_steps = {limit}")
