"""What is done to a job at each stage: encode its text, denoise, decode. Its state is in store and files."""

import base64
import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from raydistill.config.serve import KeepConfig, WorkerConfig
from raydistill.errors import SamplingError
from raydistill.service import video
from raydistill.service.engine import Engine
from raydistill.service.files import Files
from raydistill.service.leases import Lease, Leases

log = logging.getLogger(__name__)


class Stages:
    """The three stages over one set of loaded bundles."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        leases: Leases,
        files: Files,
        config: WorkerConfig,
        keep: KeepConfig,
        stopping: threading.Event,
    ):
        """`stopping` set: the step in hand is finished, saved, and the job given back."""
        self.engines, self.leases, self.files = engines, leases, files
        self.config, self.keep, self.stopping = config, keep, stopping

    def encode(self, lease: Lease) -> None:
        """Prompt -> text embedding, saved."""
        began = time.monotonic()
        text = self.engines[lease.job.bundle].encode(lease.job.request["prompt"])
        saved = {"text": self._save(lease, "text", text), "step": 0}
        seconds = time.monotonic() - began
        timings = {**lease.job.timings, "encode_s": seconds}
        self.leases.advance(lease, "denoise", saved=saved, timings=timings, seconds=seconds)

    def denoise(self, lease: Lease) -> None:
        """Noise, or the state that was last saved, -> clean latents, saved."""
        job, engine = lease.job, self.engines[lease.job.bundle]
        saved, timings = dict(job.saved or {}), {"denoise_s": 0.0, "passes": 0, **job.timings}
        began = saved_at = time.monotonic()
        text, step = self._load(saved["text"]), saved["step"]
        x = self._load(saved["latents"]) if step else engine.noise(job.request)
        for i in range(step, job.num_steps):
            if self.stopping.is_set():
                return self._give_back(lease, saved, x, i, timings)
            step_began = time.monotonic()
            x, x0 = engine.step(job.request, i, x, text)
            if not x.isfinite().all():
                raise SamplingError(f"step {i + 1} of plan '{job.request['plan']}' gave NaN or infinity")
            timings["denoise_s"] += time.monotonic() - step_began
            timings["passes"] += engine.num_passes(job.request["plan"], i)
            state, last = None, i + 1 == job.num_steps
            if not last and time.monotonic() - saved_at >= self.config.checkpoint_every_s:
                saved |= {"latents": self._save(lease, f"{i + 1}", x), "step": i + 1}
                state, saved_at = saved, time.monotonic()
            self.leases.progress(
                lease,
                step=i + 1,
                expert=engine.expert(job.request["plan"], i),
                passes=engine.num_passes(job.request["plan"], i),
                timings=timings,
                saved=state,
                preview=None if last else self._preview(lease, engine, x0, i),
            )
        digest = hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
        saved = {"latents": self._save(lease, "clean", x), "step": job.num_steps, "latents_sha256": digest}
        seconds = time.monotonic() - began
        self.leases.advance(lease, "decode", saved=saved, timings=timings, seconds=seconds)

    def _give_back(
        self, lease: Lease, saved: dict[str, Any], x: Tensor, step: int, timings: dict[str, float]
    ) -> None:
        """Save the state after `step` steps and let another replica go on."""
        if step > saved["step"]:
            saved |= {"latents": self._save(lease, f"{step}", x), "step": step}
            self.leases.keep(lease, saved, timings)
        self.leases.release(lease)

    def decode(self, lease: Lease) -> None:
        """Clean latents -> video, thumbnail and spritesheet, published."""
        job, saved, began = lease.job, dict(lease.job.saved or {}), time.monotonic()
        request = job.request
        frames = self.engines[job.bundle].decode(self._load(saved["latents"]))
        about = {"bundle": request["bundle"], "seed": request["seed"], "plan": request["plan"]}
        made = {
            "video": ("video.mp4", video.mp4(frames, request["fps"], about)),
            "thumbnail": ("thumbnail.webp", video.webp(frames[len(frames) // 2], longest=512)),
            "spritesheet": ("spritesheet.webp", video.spritesheet(frames)),
        }
        folder = f"videos/{job.id}/{job.fence}"
        result = {name: self.files.write(f"{folder}/{file}", data) for name, (file, data) in made.items()}
        seconds = time.monotonic() - began
        self.leases.publish(
            lease,
            result={**result, "latents_sha256": saved["latents_sha256"]},
            timings={**job.timings, "decode_s": seconds},
            seconds=seconds,
            keep_s=self.keep.videos_s,
        )
        self.files.remove(f"work/{job.id}")

    def _save(self, lease: Lease, name: str, tensor: Tensor) -> dict[str, Any]:
        # The fence in the name: a replica thought dead never writes over what its successor reads.
        file = f"work/{lease.job.id}/{lease.job.fence}-{name}.safetensors"
        return self.files.write(file, save({"tensor": tensor.contiguous()}))

    def _load(self, entry: dict[str, Any]) -> Tensor:
        return load(self.files.read(entry))["tensor"]

    def _preview(self, lease: Lease, engine: Engine, x0: Tensor, i: int) -> dict[str, Any] | None:
        try:
            picture = engine.preview(x0)
        except Exception:  # a video is not given up for a preview
            log.warning("%s: no preview of step %d", lease.job.id, i + 1, exc_info=True)
            return None
        if picture is None:
            return None
        data = base64.b64encode(video.webp(picture, self.config.preview_side)).decode()
        expert = engine.expert(lease.job.request["plan"], i)
        return {"b64_json": data, "index": i, "step": i + 1, "expert": expert, "format": "webp"}


STAGES = {"encode": Stages.encode, "denoise": Stages.denoise, "decode": Stages.decode}


def out_of_memory(error: Exception) -> bool:
    """Whether the device was too small for the request: trying again would be the same."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)
