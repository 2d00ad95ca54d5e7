"""How each expert is trained: its objective, its optimizers, its critics."""

from dataclasses import dataclass, field
from typing import Literal

from raydistill.config.checks import at_least, fraction, positive
from raydistill.errors import InvalidValue

Representation = Literal[
    "raw",
    "difference",
    "low_frequency",
    "high_frequency",
    "local_correlation",
    "global_correlation",
    "learned",
    "learned_conv",
]
"""What of a video counts as its motion (MCM, sec. 3.2 and table 5)."""


OBJECTIVE_TERMS = (
    "consistency",
    "motion",
    "temporal_coherence",
    "appearance",
    "adversarial",
    "feature_matching",
)
"""Fields of `ObjectiveConfig` that are weights."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of L = sum_i lambda_i L_i. A term of weight 0 is never computed."""

    consistency: float = 1.0
    """Weight of the distance between the latents themselves, pseudo-Huber (DCM, eq. 7)."""
    motion: float = 0.0
    """Weight of the same distance between motion representations (MCM, eq. 6)."""
    representation: Representation = "learned"
    """What the motion term compares. `learned`: a small head per frame, trained along, left out afterwards;
    `learned_conv`: the same with 3x3 kernels; `raw` compares everything, as consistency does."""
    appearance: float = 0.0
    """Weight of the image critic's score of decoded frames (MCM: 1). Not for the semantic expert of two,
    whose jumps end in noise."""
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
        positive("objective.huber_c", self.huber_c)
        at_least("objective.coherence_stride", self.coherence_stride, 1)
        for name in OBJECTIVE_TERMS:
            at_least(f"objective.{name}", getattr(self, name), 0)
        if not self.consistency and not self.motion:
            raise InvalidValue("objective.consistency", 0, "above 0, or objective.motion: nothing to distil")


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
        positive("optimizer.learning_rate", self.learning_rate)
        for name in ("warmup_steps", "weight_decay", "gradient_clipping"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for beta in self.betas:
            fraction("optimizer.betas", beta)


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
        at_least("critic.channels", self.channels, 2)
        if self.channels % (2 if self.channels <= 64 else 32):
            raise InvalidValue("critic.channels", self.channels, "even, and above 64 a multiple of 32")
        at_least("critic.stride", self.stride, 1)


@dataclass(frozen=True, kw_only=True)
class AppearanceConfig:
    """The image critic: heads on a frozen net for single frames. Built only if objective.appearance > 0."""

    features: str = "raydistill/world/weights/hard/features"
    """Folder of the frozen net: the small world's own, or a DINOv2 of `transformers`."""
    num_frames: int = 2
    """Frames of each clip that are decoded and judged (MCM: 2)."""
    images_per_step: int = 32
    """Real images per optimizer step over all workers."""
    augment: bool = True
    """Colour, shift and cut-out before the net sees a frame (DiffAugment), real and generated alike."""
    gradient_penalty: float = 0.0
    """Weight of the penalty on the critic's slope in the net's features (MCM's code: 1e-5). Fixed."""
    channels: int = 64
    """Width in which a head compares tokens with the caption."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.99))
    )
    """The critic's own (MCM: ten times the student's rate)."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_frames", "images_per_step", "channels"):
            at_least(f"appearance.{name}", getattr(self, name), 1)
        at_least("appearance.gradient_penalty", self.gradient_penalty, 0)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One expert's training: what all stages have."""

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
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    """The image critic."""
    head_decay: float = 0.95
    """Decay of the slow copy of a learned motion representation, per optimizer step (MCM: 0.95)."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("num_steps", "global_batch", "micro_batch"):
            at_least(name, getattr(self, name), 1)
        fraction("head_decay", self.head_decay)

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches per worker and optimizer step. Raises InvalidValue if the batch does not divide."""
        rounds, rest = divmod(self.global_batch, num_workers * self.micro_batch)
        if rest or not rounds:
            parts = f"{num_workers} workers x {self.micro_batch} micro_batch"
            raise InvalidValue("global_batch", self.global_batch, f"a multiple of {parts}")
        images = self.appearance.images_per_step
        if self.objective.appearance and images % (num_workers * rounds):
            parts = f"{num_workers} workers x {rounds} micro-batches"
            raise InvalidValue("appearance.images_per_step", images, f"a multiple of {parts}")
        return rounds


@dataclass(frozen=True, kw_only=True)
class SemanticConfig(StageConfig):
    """The semantic expert, or the only one of experts=single."""

    lora_rank: int = 0
    """0: all weights are trained (DCM). Else the rank of a LoRA on the teacher's attention and feed-forward
    layers, whose base is held once for the teacher and both experts."""
    lora_alpha: float = 64.0
    """Scale of a branch is alpha / rank. Unused without rank."""

    def __post_init__(self):
        """Check ranges."""
        StageConfig.__post_init__(self)
        at_least("semantic.lora_rank", self.lora_rank, 0)
        positive("semantic.lora_alpha", self.lora_alpha)


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
        at_least("detail.lora_rank", self.lora_rank, 1)
        positive("detail.lora_alpha", self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class MotionConfig(StageConfig):
    """The motion student (MCM): a LoRA on the teacher, over the whole path."""

    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(consistency=0.0, motion=1.0))
    """Terms of the loss."""
    lora_rank: int = 32
    """Rank of the low-rank branches (MCM: 64)."""
    lora_alpha: float = 32.0
    """Scale of a branch is alpha / rank (MCM: 64 / 64)."""

    def __post_init__(self):
        """Check ranges."""
        StageConfig.__post_init__(self)
        at_least("motion.lora_rank", self.lora_rank, 1)
        positive("motion.lora_alpha", self.lora_alpha)
