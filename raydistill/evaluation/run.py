"""Draw every sampler's clips from the same noise and captions, and measure them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from raydistill import consistency, draws, keyed, models, sampler, student
from raydistill.evaluation import appearance, centroid, features, measures, steadiness
from raydistill.evaluation.appearance import Sign
from raydistill.evaluation.candidates import Candidate, Lineup
from raydistill.evaluation.features import RandomFeatures
from raydistill.evaluation.ground import Anchor, Frames, Ground, NumpyLatents
from raydistill.evaluation.measures import Asked
from raydistill.evaluation.records import Record, RecordStore, source_digest
from raydistill.evaluation.summary import CONTROL, ROUND_TRIP
from raydistill.models.judge import Judge
from raydistill.models.protocols import VideoCodec
from raydistill.types import Text

DECODE = "decode"
Progress = Callable[[str, int, int], None]
"""(what, clips done, clips in all)."""


@dataclass(frozen=True)
class Setting:
    """The small world's ground."""

    asked: Asked
    text: Text
    """Embedded captions, one per clip."""
    seed: int
    """Keys the noise, with the clip's number."""
    real: Frames
    """Real clips that distances are taken to."""
    control: Frames
    """Other real clips, clip i of caption i: what perfection scores at this number of clips."""
    codec: VideoCodec
    judge: Judge | None
    batch_size: int
    sign: Sign | None
    """The watermark to look for; None: its figure is left out."""
    identity: Mapping[str, Any]
    """Codec, judge and real clips, for fingerprints."""
    measured: Callable[[Frames], Frames] = lambda frames: frames
    """What of a clip is measured, for samples and control alike; `real` is so already, pictures show all."""
    device: str = "cpu"
    """Where networks compute."""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a report says besides."""

    @property
    def captions(self) -> tuple[str, ...]:
        """One per clip."""
        return self.asked.captions

    @property
    def num_reference(self) -> int:
        """Real clips that distances are taken to."""
        return len(self.real)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Latents of one clip (c, f, h, w)."""
        return self._made[0]

    @property
    def meter(self) -> "WorldMeter":
        """Knows what the captions demand."""
        return self._made[1]

    @cached_property
    def _made(self) -> tuple[tuple[int, ...], "WorldMeter"]:
        return encode(self.codec, self.control[:1]).shape[1:], WorldMeter(self)

    def decode(self, latents: NumpyLatents) -> Frames:
        """Latents to clips."""
        return decode(self.codec, latents)

    def real_latents(self, indices: Sequence[int]) -> NumpyLatents:
        """Latents of real clips."""
        return encode(self.codec, self.control[list(indices)])

    def real_frames(self, count: int) -> tuple[str, Frames]:
        """Real clips as they were drawn."""
        return CONTROL, self.control[:count]


@torch.inference_mode()
def encode(codec: VideoCodec, frames: Frames, batch_size: int = 32) -> NumpyLatents:
    """Clips to latents."""
    parts = [
        codec.encode(torch.from_numpy(frames[i : i + batch_size]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        for i in range(0, len(frames), batch_size)
    ]
    return torch.cat(parts).numpy()


@torch.inference_mode()
def decode(codec: VideoCodec, latents: NumpyLatents, batch_size: int = 32, device: str = "cpu") -> Frames:
    """Latents to clips, rounded to bytes as a video file would be."""
    out: Frames = np.zeros((len(latents), 0, 0, 0, 3), np.uint8)
    for i in range(0, len(latents), batch_size):
        pixels = codec.decode(torch.from_numpy(latents[i : i + batch_size]).to(device))
        frames = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
        if not i:  # at once: clips of a real model are large
            out = np.empty((len(latents), *frames.shape[1:]), np.uint8)
        out[i : i + batch_size] = frames
    return out


@torch.inference_mode()
def draw_latents(candidate: Candidate, setting: Ground, indices: Sequence[int]) -> NumpyLatents:
    """Sample the clips of the given numbers; what clip i is does not depend on the batch it is drawn in."""
    index = torch.as_tensor(indices)
    noise = draws.noise(setting.seed, index, "evaluate", setting.latent_shape).to(setting.device)
    again = sampler.keyed_noise(setting.seed, index)
    fields, schedule, plan = candidate.fields, candidate.schedule, candidate.plan
    text = setting.text[index].to(setting.device)
    return sampler.sample(fields, schedule, plan, noise, text, noise_at=again).cpu().numpy()


@torch.inference_mode()
def judge_clips(
    judge: Judge, frames: Frames, batch_size: int = 64
) -> dict[str, Float[np.ndarray, "n values"]]:
    """Logits per attribute."""
    clips = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)
    parts = [judge(clips[i : i + batch_size]) for i in range(0, len(clips), batch_size)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


class WorldMeter:
    """Measures clips of the small world, where every caption can be checked."""

    distance = "frechet"

    def __init__(self, setting: Setting):
        """Nothing is computed yet."""
        self.setting = setting
        features = RandomFeatures(setting.batch_size)
        self.features = lambda frames: features(setting.measured(frames))

    @property
    def real_features(self) -> Float[np.ndarray, "n d"]:
        """Of the real clips that distances are taken to."""
        return self.features(self.setting.real)

    @cached_property
    def real_energy(self) -> float:
        """Mean gradient energy of the real clips."""
        return float(measures.gradient_energy(self.setting.real).mean())

    @cached_property
    def real_look(self) -> tuple[Float[np.ndarray, " radii"], float]:
        """Mean log spectrum and saturation of the real clips."""
        real = self.setting.real
        return appearance.log_spectrum(real).mean(axis=0), float(appearance.saturation(real).mean())

    @cached_property
    def control(self) -> Record:
        """Real clips measured as if they were samples."""
        return self._as_sample(self.setting.control)

    @cached_property
    def round_trip(self) -> Record:
        """The same real clips through the codec: what it costs alone."""
        latents = encode(self.setting.codec, self.setting.control)
        return self._as_sample(decode(self.setting.codec, latents))

    def _as_sample(self, frames: Frames) -> Record:
        empty = np.zeros((len(frames), 0, 0, 0, 0), np.float32)
        seen = self.features(frames)
        return Record(empty, seen, self._values(frames, seen), passes=0, seconds_per_clip=0.0)

    def references(self, anchor: Anchor | None) -> dict[str, Record]:
        """Real clips, and what the codec makes of them."""
        return {CONTROL: self.control, ROUND_TRIP: self.round_trip}

    def measure(
        self, latents: NumpyLatents, anchor: Anchor | None
    ) -> tuple[Float[np.ndarray, "n d"], dict[str, Float[np.ndarray, " n"]]]:
        """Features and figures of samples."""
        frames = self.setting.decode(latents)
        seen = self.features(frames)
        values = self._values(frames, seen)
        if anchor is not None:
            values["teacher/latent_rmse"] = measures.latent_rmse(latents, anchor.latents)
            values["teacher/psnr"] = measures.psnr(frames, anchor.frames)
        return seen, values

    def _values(self, frames: Frames, seen: Float[np.ndarray, "n d"]) -> dict[str, Float[np.ndarray, " n"]]:
        setting, frames = self.setting, self.setting.measured(frames)
        values = measures.path_measures(frames, setting.asked)
        if setting.judge is not None:
            logits = judge_clips(setting.judge, frames)
            values |= measures.attributes_right(logits, setting.judge.attributes, setting.asked)
        values["sharpness"] = measures.gradient_energy(frames) / self.real_energy
        values["near_black"] = measures.near_black(frames)
        values |= self._look(frames)
        if len(set(setting.asked.captions)) < len(frames):
            values["diversity"] = measures.spread(seen, setting.asked.captions)
        return values

    def _look(self, frames: Frames) -> dict[str, Float[np.ndarray, " n"]]:
        """Measure how frames look beside clean ones."""
        spectrum, vivid = self.real_look
        values = {
            "spectrum": appearance.spectral_distance(frames, spectrum),
            "vividness": appearance.saturation(frames) / vivid,
            "black_clip": appearance.black_clip(frames),
        }
        if self.setting.sign is not None:
            values["watermark"] = appearance.watermark(frames, self.setting.sign)
        return values


class Bench:
    """Measures samplers one after the other, keeping each result on disk."""

    def __init__(self, setting: Ground, store: RecordStore, progress: Progress = lambda *_: None):
        """Nothing is computed yet."""
        self.setting, self.store, self.progress = setting, store, progress
        self.anchors: dict[str, Anchor] = {}
        """Of each teacher by name, once it was measured."""
        self.computed: list[str] = []
        """Names of the samplers that were not found on disk."""

    def run(self, lineup: Lineup) -> dict[str, Record]:
        """Record of every candidate, by name; the teachers' anchors first: their students are compared."""
        anchors, out, first = self.anchors, dict[str, Record](), lineup.anchors
        turn = list(dict.fromkeys(one.needs for one in lineup.candidates))  # so that each is loaded once
        ordered = sorted(lineup.candidates, key=lambda one: turn.index(one.needs))
        ordered.sort(key=lambda one: one is not first.get(one.teacher))
        for number, candidate in enumerate(ordered):
            title = f"[{number + 1}/{len(ordered)}] {candidate.label}"
            record = self._record(candidate, anchors.get(candidate.teacher), title)
            out[candidate.name] = record
            if candidate is first.get(candidate.teacher):
                anchors[candidate.teacher] = Anchor(record.latents, candidate.identity, self.setting)
        return out

    def _record(self, candidate: Candidate, anchor: Anchor | None, title: str) -> Record:
        identity = {
            "sampler": candidate.identity,
            "anchor": anchor and anchor.identity,
            "setting": {
                **self.setting.identity,
                "seed": self.setting.seed,
                "captions": self.setting.captions,
            },
            "code": code_digest(),
        }
        found = self.store.load(candidate.name, identity)
        count = len(self.setting.captions)
        if found is not None:
            self.progress(title, count, count)
            return found
        latents, seconds = self._sample(candidate, title)
        seen, values = self.setting.meter.measure(latents, anchor)
        record = Record(latents, seen, values, candidate.passes, seconds / count)
        self.store.save(candidate.name, identity, record)
        self.computed.append(candidate.name)
        return record

    def _sample(self, candidate: Candidate, title: str) -> tuple[NumpyLatents, float]:
        parts, seconds, count = [], 0.0, len(self.setting.captions)
        for jump in candidate.plan.jumps:
            _ = candidate.fields[jump.expert]  # loaded now, not while the clock runs
        for start in range(0, count, self.setting.batch_size):
            self.progress(title, start, count)
            begun = time.perf_counter()
            parts.append(
                draw_latents(
                    candidate, self.setting, range(start, min(start + self.setting.batch_size, count))
                )
            )
            seconds += time.perf_counter() - begun
        self.progress(title, count, count)
        return np.concatenate(parts), seconds


@cache
def code_digest() -> str:
    """Digest of the sources that shape a record's numbers: changed code makes old records unknown."""
    packages = [Path(str(module.__file__)).parent for module in (consistency, models)]
    files = [
        Path(str(module.__file__))
        for module in (sampler, draws, keyed, centroid, features, measures, appearance, steadiness)
    ]
    return source_digest(
        [
            *(path for folder in packages for path in folder.glob("*.py")),
            *files,
            Path(__file__),
            *(Path(__file__).with_name(name) for name in ("real.py", "networks.py", "ground.py")),
            Path(str(student.__file__)),
        ]
    )


def time_in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all in turn, round after round, after one round to warm up.

    Turns spread whatever else the machine does over all calls alike.
    """
    out: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if number:
                out[name].append(time.perf_counter() - begun)
    return out


def latency_calls(
    candidates: Sequence[Candidate], setting: Ground, batch: int
) -> dict[str, Callable[[], object]]:
    """One call per candidate by label, sampling `batch` clips without text and codec."""
    indices = [i % len(setting.captions) for i in range(batch)]
    return {one.label: partial(draw_latents, one, setting, indices) for one in candidates}


def decode_call(setting: Ground, batch: int) -> dict[str, Callable[[], object]]:
    """One call that decodes `batch` clips."""
    latents = setting.real_latents([i % len(setting.captions) for i in range(batch)])
    return {DECODE: partial(setting.decode, latents)}
