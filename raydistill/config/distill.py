"""What `jobs/distill.py` takes. Defaults are the small world's run on two CPU cores."""

from dataclasses import dataclass, field
from typing import Any, Literal

from raydistill.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Times at which the teacher's path is cut; a training example jumps from one node."""

    num_intervals: int = 50
    """Number of teacher steps from noise to data, N, as in DCM. At least 2."""
    shift: float = 1.0
    """Warp of the times towards noise, by * t / (1 + (by - 1) t) (DCM: 17). 1 is none."""
    last: float = 0.0
    """Last node, in [0, boundary). DCM stops at 0.0167, short of clean data."""

    def __post_init__(self):
        """Check ranges."""
        _at_least("grid.num_intervals", self.num_intervals, 2)
        _positive("grid.shift", self.shift)
        if not 0.0 <= self.last < 1.0:
            raise InvalidValue("grid.last", self.last, "in [0, 1)")


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
        _fraction("target.decay", self.decay)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of L = sum_i lambda_i L_i. A term of weight 0 is never computed."""

    huber_c: float = 1e-2
    """Width of the pseudo-Huber bowl, in latent units (DCM: 1e-3)."""
    normalise_jump: bool = True
    """Divide guess and goal by the length of the jump, so that every t weighs alike."""
    temporal_coherence: float = 0.0
    """Weight of L_TC (DCM, eq. 8; its semantic expert uses 1)."""
    coherence_stride: int = 3
    """Distance l between the two compared latent frames in L_TC."""
    adversarial: float = 0.0
    """Weight of the generator's hinge (DCM: 0.5). Detail expert only."""
    feature_matching: float = 0.0
    """Weight of L_FM on the frozen teacher's features (DCM: 0.1 HunyuanVideo, 1 Wan). Detail expert only."""

    def __post_init__(self):
        """Check ranges."""
        _positive("objective.huber_c", self.huber_c)
        _at_least("objective.coherence_stride", self.coherence_stride, 1)
        for name in ("temporal_coherence", "adversarial", "feature_matching"):
            _at_least(f"objective.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate, a pure function of the step."""

    learning_rate: float = 1e-3
    """Peak learning rate (DCM: 1e-6 semantic, 5e-6 detail, on 1-13 B parameters)."""
    warmup_steps: int = 20
    """Optimizer steps of linear rise from 0."""
    decay: Literal["constant", "linear"] = "linear"
    """`constant` after the warm-up, or `linear`: falling to 0 over the last half of the stage."""
    weight_decay: float = 0.0
    """Decoupled weight decay (DCM: 1e-3)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors (DCM's critic: 0, 0.999)."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self):
        """Check ranges."""
        _positive("optimizer.learning_rate", self.learning_rate)
        for name in ("warmup_steps", "weight_decay", "gradient_clipping"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        for beta in self.betas:
            _fraction("optimizer.betas", beta)


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The detail expert's discriminator: small heads on the frozen teacher's features."""

    real: Literal["target", "data"] = "data"
    """What it calls real: the consistency target (as DCM published) or re-noised clean latents."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, betas=(0.0, 0.999))
    )
    """Its own optimizer (DCM: 1e-5, betas 0 and 0.999)."""
    channels: int = 64
    """Width of each head (DCM: 1024): even, above 64 a multiple of 32, for its normalisation's groups."""
    stride: int = 2
    """Every how many transformer blocks a feature map is taken."""

    def __post_init__(self):
        """Check ranges."""
        _at_least("critic.channels", self.channels, 2)
        if self.channels % (2 if self.channels <= 64 else 32):
            raise InvalidValue("critic.channels", self.channels, "even, and above 64 a multiple of 32")
        _at_least("critic.stride", self.stride, 1)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One expert's training. The semantic expert uses these fields alone."""

    num_steps: int = 600
    """Optimizer steps of the stage."""
    global_batch: int = 32
    """Samples per optimizer step over all workers; what one step sees does not depend on their number."""
    micro_batch: int = 16
    """Samples per worker and forward pass. Gradient accumulation follows: global / (workers * micro)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the student."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Terms of the loss."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_steps", "global_batch", "micro_batch"):
            _at_least(name, getattr(self, name), 1)

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches per worker and optimizer step. Raises InvalidValue if the batch does not divide."""
        rounds, rest = divmod(self.global_batch, num_workers * self.micro_batch)
        if rest or not rounds:
            parts = f"{num_workers} workers x {self.micro_batch} micro_batch"
            raise InvalidValue("global_batch", self.global_batch, f"a multiple of {parts}")
        return rounds


@dataclass(frozen=True, kw_only=True)
class DetailConfig(StageConfig):
    """The detail expert: frozen semantic expert + LoRA + own copies of the time-dependent layers."""

    num_steps: int = 300
    """Optimizer steps of the stage."""
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(adversarial=0.05, feature_matching=0.1)
    )
    """Terms of the loss."""
    lora_rank: int = 8
    """Rank of the attention's low-rank branch (DCM: 128). Unused with experts=dual_full."""
    lora_alpha: float = 16.0
    """Scale of the branch is alpha / rank (DCM: 256 / 128)."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Built only if objective.adversarial > 0."""

    def __post_init__(self):
        """Check ranges."""
        StageConfig.__post_init__(self)
        _at_least("detail.lora_rank", self.lora_rank, 1)
        _positive("detail.lora_alpha", self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How gradients move between machines; DeepSpeed's own JSON is derived from it."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain reference: same numbers, no sharding, every worker holds everything."""
    zero_stage: int = 2
    """What ZeRO shards over workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights. Of the
    student and the critic, that is: the teacher, the target and the moving averages of trained weights, in
    float32, are whole on every worker at any stage."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory. Needs zero_stage >= 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward of every network; master weights, moving averages and the exported student are
    float32 either way."""
    activation_checkpointing: bool = False
    """Recompute the student's activations in the backward pass: less memory, about a third more time."""
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
        _at_least("scale.num_workers", self.num_workers, 1)
        _positive("scale.cpus_per_worker", self.cpus_per_worker)
        _at_least("scale.threads_per_worker", self.threads_per_worker, 1)
        _at_least("scale.max_failures", self.max_failures, 0)


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
                _at_least(f"sampling.{name}", count, 1)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A many-step teacher becomes a few-step student."""

    teacher: str = "raydistill/world/weights/teacher"
    """Folder of the frozen many-step model."""
    codec: str = "raydistill/world/weights/codec"
    """Folder of the codec that made the latents; its fingerprint is compared with theirs."""
    data: str = "build/latents"
    """Latents artifact to train on."""
    output: str = "build/student"
    """Run folder: checkpoints, metrics and, at the end, the student."""
    seed: int = 7
    """Keys every random number together with the global sample index."""
    experts: Literal["dual", "single", "dual_full"] = "dual"
    """`dual`: semantic + LoRA detail; `dual_full`: two whole networks; `single`: the semantic stage alone,
    over the whole range (a plain consistency model)."""
    boundary: float = 0.74
    """Time at which the semantic expert hands over, in (0, 1); it belongs to the detail expert."""
    grid: GridConfig = field(default_factory=GridConfig)
    """Times of the teacher's path."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the teacher, w in uncond + w (cond - uncond); 1 is off."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """Network that gives the goal."""
    average_decay: float = 0.995
    """Decay of the moving average of the student that is kept as the result, in [0, 1); 0 keeps the last.
    At step n at most (1 + n) / (10 + n), so that a short run's average is not mostly its beginning: 0.995
    holds from step 1,790 on."""
    semantic: StageConfig = field(default_factory=StageConfig)
    """First stage: t in (boundary, 1]."""
    detail: DetailConfig = field(default_factory=DetailConfig)
    """Second stage: t in (0, boundary]."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """ZeRO, precision, memory."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Workers."""
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
        if self.experts != "single" and not self.grid.last < self.boundary:
            raise InvalidValue("grid.last", self.grid.last, f"below boundary = {self.boundary}")
        for name in ("adversarial", "feature_matching"):
            weight = getattr(self.semantic.objective, name)
            if weight:
                raise InvalidValue(f"semantic.objective.{name}", weight, "0: belongs to the detail expert")
        _fraction("average_decay", self.average_decay)
        for name in ("save_every", "keep", "report_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("semantic", "detail") if self.experts != "single" else ("semantic",):
            self._check_stage(name)

    def _check_stage(self, name: str):
        """Batch against workers; warm-up against length."""
        stage: StageConfig = getattr(self, name)
        try:
            stage.accumulation(self.scale.num_workers)
        except InvalidValue as error:
            raise InvalidValue(f"{name}.{error.key}", error.value, error.expected) from None
        if stage.optimizer.warmup_steps > stage.num_steps:
            value, limit = stage.optimizer.warmup_steps, stage.num_steps
            raise InvalidValue(f"{name}.optimizer.warmup_steps", value, f"at most num_steps = {limit}")


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise InvalidValue(key, value, f"at least {low}")


def _positive(key: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise InvalidValue(key, value, "a positive number")


def _fraction(key: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise InvalidValue(key, value, "in [0, 1)")
