"""What `serve/app.py` takes, as `args` of the application in a Serve config. Defaults suit one machine."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf

from raydistill.config.checks import at_least, positive
from raydistill.config.load import from_mapping
from raydistill.errors import InvalidValue, MissingValue

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")
Previews = Literal["codec", "linear", "off"]


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a request may ask, and what the queue takes: checked before anything is queued."""

    prompt_chars: int = 2000
    """Longest prompt."""
    body_kib: int = 1024
    """Largest body of a request."""
    body_timeout_s: float = 10.0
    """A request's body has to be whole by then."""
    open_bodies: int = 512
    """Requests of one process whose bodies are being read; more are turned away at once."""
    cost: float = 1e6
    """Highest cost of one request, in network passes times megapixels of its frames."""
    queued_jobs: int = 1000
    """Jobs that wait or run, of all tenants together; above it the answer is 429 queue_full."""
    queued_cost: float = 1e7
    """Their remaining cost together, likewise."""
    sync_timeout_s: float = 600.0
    """A synchronous request is answered 504 after it; its job goes on and can be asked for."""
    streams: int = 200
    """Open event streams and synchronous requests per ingress replica."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("prompt_chars", "body_kib", "open_bodies", "queued_jobs", "streams"):
            at_least(f"limits.{name}", getattr(self, name), 1)
        for name in ("body_timeout_s", "cost", "queued_cost", "sync_timeout_s"):
            positive(f"limits.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Who may ask."""

    required: bool = True
    """Every request but those for /health, /ready, /openapi.json and the page needs an API key, see
    `jobs/keys.py`. Off only where the port cannot be reached by others."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Host names that requests may carry where no key is required: others come from a page that was led here
    by its name server."""
    failures_per_minute: int = 20
    """Wrong keys that one address may try; then 429 for the rest of the minute."""

    def __post_init__(self):
        """Check ranges."""
        at_least("auth.failures_per_minute", self.failures_per_minute, 1)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How sampler replicas take and keep jobs."""

    lease_s: float = 15.0
    """A job whose holder has not been heard of for so long is taken over by another replica."""
    heartbeat_s: float = 3.0
    """How often a replica says that it lives; well below lease_s."""
    poll_s: float = 0.05
    """How often a replica without work looks for some."""
    stage_timeout_s: float = 1800.0
    """A stage that takes longer counts as hung: its lease is no longer renewed."""
    checkpoint_every_s: float = 0.5
    """The state is saved after each step that ends so long after the last save; 0: after every step."""
    strikes: int = 3
    """A job that so many attempts in a row died or failed over, for no known reason and without getting on,
    fails as internal_error."""
    retry_after_s: float = 1.0
    """First wait of a job after a failure of storage or of unknown cause; doubles each time."""
    encode_ahead: int = 4
    """Jobs that wait with their text encoded; more are not encoded yet."""
    previews: Previews = "codec"
    """Preview of each step's prediction: through the codec, by the bundle's linear map, or none. A large
    codec takes seconds for one."""
    preview_side: int = 256
    """Longest side of a preview, in pixels."""
    device: str = "cpu"
    """Where the networks run: cpu, cuda."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of student and teacher; bf16 halves their memory. The state between steps, codec and text encoder stay
    as they were trained."""
    threads: int = 1
    """Threads of torch per replica on the CPU."""
    merge: bool = False
    """Fold LoRA into weights of its own: faster passes, the base held once per expert."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("lease_s", "heartbeat_s", "poll_s", "stage_timeout_s", "retry_after_s"):
            positive(f"worker.{name}", getattr(self, name))
        at_least("worker.checkpoint_every_s", self.checkpoint_every_s, 0)
        for name in ("strikes", "encode_ahead", "threads"):
            at_least(f"worker.{name}", getattr(self, name), 1)
        at_least("worker.preview_side", self.preview_side, 16)
        if self.heartbeat_s * 2 > self.lease_s:
            raise InvalidValue("worker.heartbeat_s", self.heartbeat_s, "at most half of worker.lease_s")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """How long things are kept, and how often the janitor looks."""

    videos_s: float = 86400.0
    """A video's files, after it is made; then /content answers 410 and the record stays."""
    records_s: float = 30 * 86400.0
    """Records and events of jobs that ended."""
    idempotency_s: float = 86400.0
    """Idempotency keys."""
    retry_window_s: float = 120.0
    """A repeated request without a key that says it is a retry gets the job of the first within this time."""
    orphans_s: float = 600.0
    """Jobs whose bundle is no longer served fail after it; files that no job names are removed after it."""
    sweep_s: float = 30.0
    """Between two rounds of the janitor."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("videos_s", "records_s", "idempotency_s", "retry_window_s", "orphans_s", "sweep_s"):
            positive(f"keep.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The server: where jobs and files are, what is served, and its limits."""

    store: str = "sqlite:///runs/serve/jobs.sqlite"
    """SQLAlchemy URL of the job store: an SQLite file on one machine, postgresql+psycopg://... for several;
    "env:NAME" takes it from an environment variable, where it holds a password."""
    artifacts: str = "runs/serve/artifacts"
    """Folder or fsspec URL (s3://bucket/prefix) of videos and saved states."""
    redirect: bool = False
    """Answer /content with a redirect to a signed URL of the storage instead of the bytes."""
    bundles: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> folder of jobs/export.py: every bundle that samplers hold. Empty: tiny: runs/tiny/bundle."""
    models: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Name that requests give -> bundle -> weight: versions of one model share its requests by weight. Empty:
    each bundle is a model of its own name."""
    pipeline: Literal["monolithic", "staged"] = "monolithic"
    """One deployment whose replicas run all stages side by side, or one for text encoding, one for denoising
    and one for decoding."""
    logs: str = ""
    """Folder for JSON lines of what happened to each job, one file per process; empty: stderr alone."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Of requests and of the queue."""
    auth: AuthConfig = field(default_factory=AuthConfig)
    """API keys."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """Sampler replicas."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    """The janitor."""

    def __post_init__(self):
        """Refuse weights of bundles that the server does not have."""
        model_table(self.models, self.bundle_table())

    def bundle_table(self) -> dict[str, str]:
        """Bundles by name."""
        return dict(self.bundles) or {"tiny": "runs/tiny/bundle"}


def model_table(
    models: Mapping[str, Mapping[str, float]], bundles: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return models with the weights of their bundles; each bundle is one where nothing was said.

    Raises InvalidValue unless every model has known bundles and weights >= 0 that are not all 0.
    """
    for model, weights in models.items():
        if unknown := sorted(set(weights) - set(bundles)):
            raise InvalidValue(f"models.{model}", unknown, f"bundles are {', '.join(sorted(bundles))}")
        if any(not 0 <= w < float("inf") for w in weights.values()) or not sum(weights.values()):
            raise InvalidValue(f"models.{model}", dict(weights), "weights of 0 or more, not all 0")
    return {model: dict(weights) for model, weights in models.items()} or {
        name: {name: 1.0} for name in bundles
    }


def read_args(args: Mapping[str, Any]) -> ServeConfig:
    """Read the `args` of a Serve application. Raises UnknownKey, InvalidValue and MissingValue."""
    return from_mapping(ServeConfig, args, "in the application's args")


def to_args(config: ServeConfig) -> dict[str, Any]:
    """Plain values, which `read_args` takes."""
    plain = OmegaConf.to_container(cast(DictConfig, OmegaConf.structured(config)))
    return cast(dict[str, Any], plain)


def from_environment(value: str, key: str) -> str:
    """Return the value, or for "env:NAME" that of the environment variable. Raises MissingValue."""
    if not value.startswith("env:"):
        return value
    name = value.removeprefix("env:")
    if not (found := os.environ.get(name)):
        raise MissingValue(key, f"the environment variable {name} is not set")
    return found
