"""Settings of what trains: how each network's gradients move between machines, precision, memory."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raydistill.errors import InvalidValue

TRAINED_BESIDE = ("critic", "image_critic", "motion_head")
"""Roles that train beside the student, as `EngineConfig` names them."""


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
class RoleConfig:
    """What the engine of a network beside the student has of its own."""

    zero_stage: int | None = None
    """What ZeRO divides of it, 0 to 3; null: as engine.zero_stage. A small critic gathers much and saves
    little at 3."""
    offload_optimizer: bool | None = None
    """Keep its optimizer states in host memory; null: as engine.offload_optimizer, where its stage allows."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How gradients move between machines; DeepSpeed's own JSON is derived from it."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain reference: same numbers, no sharding, every worker holds everything."""
    zero_stage: int = 2
    """What ZeRO divides over workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights. Of the
    student, and of what trains beside it where that has no stage of its own. At 3 the student is also read in
    shards, and the average that is kept is divided; a target that is a moving average (target.kind = ema) is
    whole on every worker at any stage, and lets the student begin whole. At 3 the layer at work is whole,
    with at most 200 million weights fetched ahead, 50 million at a time, and those below a hundred thousand:
    limits that `extra` sets, as in zero_optimization.stage3_max_live_parameters."""
    critic: RoleConfig = field(default_factory=RoleConfig)
    """Of the token critic."""
    image_critic: RoleConfig = field(default_factory=RoleConfig)
    """Of the image critic."""
    motion_head: RoleConfig = field(default_factory=RoleConfig)
    """Of the learned motion representation."""
    shard_teacher: bool = False
    """Divide the frozen teacher over the workers, as ZeRO 3 does; a layer is whole on a worker for its pass
    alone. A student that is a LoRA needs zero_stage = 3 beside it: below, it shares the teacher's weights."""
    offload_teacher: bool = False
    """Keep the teacher's shards in host memory, and bring each layer to the device for its pass: slower, and
    on one GPU the way to a teacher that does not fit beside its student. Needs shard_teacher."""
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
        self._check("engine", self.zero_stage, self.offload_optimizer, self.precision)
        for role in TRAINED_BESIDE:
            self._check(f"engine.{role}", *self._own(role))
        if self.shard_teacher and (self.backend == "torch" or self.compile_frozen):
            # Weights that come and go by hooks are not what a compiled block expects.
            raise InvalidValue(
                "engine.shard_teacher", True, "needs backend = deepspeed, compile_frozen = false"
            )
        if self.offload_teacher and not self.shard_teacher:
            raise InvalidValue("engine.offload_teacher", True, "needs engine.shard_teacher = true")

    def of(self, role: str) -> "EngineConfig":
        """Return the settings of the engine of a network beside the student, one of TRAINED_BESIDE."""
        zero_stage, offload, precision = self._own(role)
        plain = {name: RoleConfig() for name in TRAINED_BESIDE}
        own = {"zero_stage": zero_stage, "offload_optimizer": offload, "precision": precision}
        return replace(self, **own, **plain, shard_teacher=False, offload_teacher=False)

    def _own(self, role: str) -> tuple[int, bool, Literal["fp32", "bf16"]]:
        """ZeRO's stage, offload and precision of a role. All but the token critic compute in float32."""
        own: RoleConfig = getattr(self, role)
        zero_stage = self.zero_stage if own.zero_stage is None else own.zero_stage
        offload = own.offload_optimizer
        if offload is None:
            offload = self.offload_optimizer and zero_stage > 0
        return zero_stage, offload, self.precision if role == "critic" else "fp32"

    def _check(self, key: str, zero_stage: int, offload: bool, precision: str) -> None:
        """Check what one engine has."""
        if zero_stage not in range(4):
            raise InvalidValue(f"{key}.zero_stage", zero_stage, "0, 1, 2 or 3")
        if offload and zero_stage == 0:
            raise InvalidValue(f"{key}.offload_optimizer", True, f"needs {key}.zero_stage >= 1")
        if self.backend == "deepspeed" and precision == "bf16" and zero_stage == 0:
            # Without sharding DeepSpeed adds bf16 gradients up in bf16.
            raise InvalidValue("engine.precision", "bf16", f"needs {key}.zero_stage >= 1")
        if self.backend == "torch" and offload:
            raise InvalidValue(f"{key}.offload_optimizer", True, "needs engine.backend = deepspeed")
