"""A store and files of one test with workers over them, and what the bare sampler makes of a request."""

import hashlib
import time
from pathlib import Path

import torch
from service_cases import settings

from raydistill.models.text import WordVectors
from raydistill.sampler import SamplingPlan, keyed_noise, sample
from raydistill.service.bundle import read_bundle
from raydistill.service.catalog import Catalog
from raydistill.service.files import Files
from raydistill.service.requests import parse, resolve
from raydistill.service.store import JobStore
from raydistill.service.tables import open_database
from raydistill.service.worker import Worker
from raydistill.student import load_student

PROMPT = "a red circle moves slowly left over a plain background"


class Place:
    """A store and files of one test, and requests to them."""

    def __init__(self, folder: Path, bundle: Path, **changes):
        self.config = settings(folder, bundle, **changes)
        self.database = open_database(self.config.store)
        self.store = JobStore(self.database, self.config.limits, self.config.keep)
        self.files = Files(self.config.artifacts)
        self.catalog = Catalog.read(self.config.bundle_table(), self.config.models)

    def ask(self, **fields) -> str:
        request = parse({"prompt": PROMPT, "seed": 7, **fields}, self.config.limits)
        return self.store.create(resolve(request, self.catalog, self.config.limits, "anybody")).id

    def wait(self, job: str, until=lambda job: job.ended, timeout_s=30.0):
        deadline = time.monotonic() + timeout_s
        while not until(found := self.store.get(job, None)):
            assert time.monotonic() < deadline, found
            time.sleep(0.005)
        return found

    def worker(self, **changes) -> Worker:
        """A worker that has loaded its bundles and not begun."""
        stages = changes.pop("stages", ("encode", "denoise", "decode"))
        worker = Worker(self.database, self.files, self.config.worker, self.config.keep, stages)
        worker.hold(self.config.bundle_table())
        return worker

    def steps_taken(self, job: str) -> list[int]:
        return [
            data["step"]
            for _, kind, data in self.store.events(job, 0, limit=1000)
            if kind == "video.in_progress" and "expert" in data
        ]


def expected_digest(bundle: Path, plan: str, seed: int = 7) -> str:
    """What the sampler alone makes of the request."""
    student = load_student(bundle / "student", bundle / "teacher", merged=False)
    noise_at = keyed_noise(seed, torch.zeros(1, dtype=torch.int64))
    noise = noise_at(0, (1, *student.card.latent_shape))
    text = WordVectors(*student.card.text_shape)([PROMPT])
    stored = SamplingPlan.from_dict(read_bundle(bundle).plans[plan].to_dict())
    made = sample(student.fields, student.schedule, stored, noise, text, noise_at=noise_at)
    return hashlib.sha256(made.numpy().tobytes()).hexdigest()
