"""Real teachers on prepared clips of the user's own: nothing is known of what a caption demands."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from raydistill.artifacts import LatentStore
from raydistill.config.evaluate import EvaluateConfig
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact, TooFewFrames
from raydistill.evaluation import appearance, measures, steadiness
from raydistill.evaluation.candidates import Lineup, Skipped, build_lineup
from raydistill.evaluation.ground import Anchor, Features, Frames, NumpyLatents, Values
from raydistill.evaluation.records import Record
from raydistill.evaluation.run import decode
from raydistill.evaluation.summary import ROUND_TRIP
from raydistill.models.codec import load_codec
from raydistill.models.folders import codec_digest, model_digest
from raydistill.models.frame_embedding import ClipEmbedding, FrameEmbedding, load_embedding
from raydistill.models.protocols import VideoCodec
from raydistill.models.teacher import require_fit
from raydistill.models.text import null_of, text_identity
from raydistill.student import CARD, read_card
from raydistill.types import Text

FEWEST_FRAMES, FRAMES_SEEN = 3, 8
"""Frames that a clip must have, and that a network for features sees of it, spread over it."""
DISTANCE = "features/frechet"
COLUMNS = (
    "teacher/latent_rmse", "teacher/psnr", "teacher/motion", DISTANCE, "clip/text", "sharpness", "spectrum",
    "motion", "flicker",
)  # fmt: skip


@dataclass(frozen=True)
class RealSetting:
    """The first clips of prepared data, whose captions are sampled; clips after them are the reference."""

    store: LatentStore
    captions: tuple[str, ...]
    text: Text
    num_reference: int
    """0 without a network for features."""
    seed: int
    codec: VideoCodec
    network: FrameEmbedding | None
    batch_size: int
    device: str
    identity: Mapping[str, Any]
    notes: Mapping[str, Any]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Latents of one clip (c, f, h, w)."""
        return self.real_latents([0]).shape[1:]

    @property
    def meter(self) -> "RealMeter":
        """Measures clip by clip."""
        return self._meter

    @cached_property
    def _meter(self) -> "RealMeter":
        return RealMeter(self)

    def decode(self, latents: NumpyLatents) -> Frames:
        """Latents to clips, one at a time: decoding takes more memory than sampling."""
        return decode(self.codec, latents, batch_size=1, device=self.device)

    def real_latents(self, indices: Sequence[int]) -> NumpyLatents:
        """Latents as they were prepared."""
        return np.stack([row.latents for row in self.store.rows(indices)])

    def real_frames(self, count: int) -> tuple[str, Frames]:
        """Real clips as the codec gives them back: the pixels before it are not kept."""
        return ROUND_TRIP, self.decode(self.real_latents(range(count)))


@dataclass(frozen=True)
class _Watched:
    """What was read off clips, before it is compared with what real ones have."""

    features: Features
    spectra: Float[np.ndarray, "n radii"]
    values: Values


class RealMeter:
    """Figures that need no knowledge of captions; one clip is decoded at a time."""

    def __init__(self, setting: RealSetting):
        """Nothing is computed yet."""
        self.setting = setting
        self.distance = DISTANCE if setting.num_reference else None

    @property
    def real_features(self) -> Features:
        """Of the clips after those whose captions are sampled."""
        clips = self._clips(len(self.setting.captions), self.setting.num_reference)
        seen = [self._embed(self.setting.decode(one)).mean(axis=1) for one in clips]
        return np.concatenate(seen) if seen else np.zeros((0, 0))

    def references(self, anchor: Anchor | None) -> dict[str, Record]:
        """The captions' own clips through the codec.

        Their distance to the teacher's clips is that of clips which share a caption and no noise.
        """
        count = len(self.setting.captions)
        seen, values = self._figures(self._clips(0, count), anchor)
        empty = np.zeros((count, 0, 0, 0, 0), np.float32)
        return {ROUND_TRIP: Record(empty, seen, values, passes=0, seconds_per_clip=0.0)}

    def measure(self, latents: NumpyLatents, anchor: Anchor | None) -> tuple[Features, Values]:
        """Features and figures of samples, in the captions' order."""
        return self._figures((one[None] for one in latents), anchor)

    def _clips(self, first: int, count: int) -> Iterator[NumpyLatents]:
        """Latents of real clips, one by one."""
        return (self.setting.real_latents([i]) for i in range(first, first + count))

    @cached_property
    def _real(self) -> _Watched:
        """Real clips of the same captions, which ratios are taken to."""
        return self._watch(self._clips(0, len(self.setting.captions)), None)

    def _figures(self, latents: Iterable[NumpyLatents], anchor: Anchor | None) -> tuple[Features, Values]:
        """Ratios to what real clips have on average are left out where these have nothing of it."""
        watched, real = self._watch(latents, anchor), self._real
        values = dict(watched.values)
        scales = {name: float(real.values[name].mean()) for name in ("sharpness", "vividness", "motion")}
        if anchor is not None:
            scales["teacher/motion"] = float(values.pop("motion of the teacher").mean())
            values["teacher/motion"] = values["motion"]
        figures = {name: value for name, value in values.items() if name not in scales}
        figures |= {name: values[name] / scale for name, scale in scales.items() if scale > 0}
        apart = np.square(watched.spectra - real.spectra.mean(axis=0)).mean(axis=1)
        return watched.features, figures | {"spectrum": np.sqrt(apart)}

    def _watch(self, latents: Iterable[NumpyLatents], anchor: Anchor | None) -> _Watched:
        """Look at clips one after the other; clip i is of caption i, and beside the anchor's clip i."""
        features, spectra, values = list[np.ndarray](), list[np.ndarray](), list[Values]()
        for i, one in enumerate(latents):
            frames = self.setting.decode(one)
            seen = self._embed(frames)
            found = {
                "sharpness": measures.gradient_energy(frames),
                "vividness": appearance.saturation(frames),
                "near_black": measures.near_black(frames),
                "black_clip": appearance.black_clip(frames),
                "motion": steadiness.motion(frames),
                "flicker": steadiness.flicker(frames),
            }
            if self._said is not None:
                found["clip/text"] = likeness(seen, self._said[i : i + 1])
            if anchor is not None:
                theirs = anchor.frames[i : i + 1]
                found["teacher/latent_rmse"] = measures.latent_rmse(one, anchor.latents[i : i + 1])
                found["teacher/psnr"] = measures.psnr(frames, theirs)
                found["motion of the teacher"] = steadiness.motion(theirs)
            features.append(seen.mean(axis=1))
            spectra.append(appearance.log_spectrum(frames))
            values.append(found)
        together = {name: np.concatenate([one[name] for one in values]) for name in values[0]}
        return _Watched(np.concatenate(features), np.concatenate(spectra), together)

    @cached_property
    def _said(self) -> Float[np.ndarray, "n d"] | None:
        """Captions in the space of the frames; None without a network that has both."""
        network = self.setting.network
        if not isinstance(network, ClipEmbedding) or not network.speaks:
            return None
        with torch.inference_mode():
            return network.embed_captions(self.setting.captions).double().cpu().numpy()

    @torch.inference_mode()
    def _embed(self, frames: Frames) -> Float[np.ndarray, "n k d"]:
        """Vectors of frames spread over each clip; of no width without a network."""
        network, count = self.setting.network, frames.shape[1]
        if network is None:
            return np.zeros((len(frames), 1, 0))
        picked = frames[:, np.linspace(0, count - 1, min(count, FRAMES_SEEN)).round().astype(int)]
        pixels = torch.from_numpy(picked).flatten(0, 1).permute(0, 3, 1, 2).to(self.setting.device)
        vectors = network(pixels.float() / 127.5 - 1).double().cpu().numpy()
        return vectors.reshape(*picked.shape[:2], -1)


def likeness(
    frames: Float[np.ndarray, "n k d"], captions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Cosine of a clip's frames and its caption in their common space, mean over the frames; -1 to 1."""
    product = (frames * captions[:, None]).sum(axis=-1)
    return (product / np.linalg.norm(frames, axis=-1) / np.linalg.norm(captions, axis=-1)[:, None]).mean(
        axis=1
    )


def make_real(config: EvaluateConfig) -> tuple[RealSetting, Lineup]:
    """Read config.data, find its teachers and students, and load codec and network for features.

    Raises MissingArtifact for what is not there; StaleArtifact where data, teacher, codec, text encoder and
    students do not belong together; InvalidValue for a device that is not there and for fewer clips than
    num_clips, TooFewFrames for images.
    """
    _require_device(config.device)
    store, count = LatentStore(config.data), config.num_clips
    if len(store) < count:
        raise InvalidValue("num_clips", count, f"at most the {len(store)} clips of {config.data}")
    digest = codec_digest(config.codec)
    store.require_codec(digest)
    rows = store.rows(range(count))
    latents, text = rows[0].latents.shape, rows[0].text.shape
    if any(row.latents.shape != latents for row in rows):
        raise StaleArtifact(f"{config.data} holds clips of several sizes: prepare them with one")
    for folder in (config.teacher, *config.more_teachers.values()):
        require_fit(folder, latents, text)
    codec = load_codec(config.codec).to(config.device)
    if codec.num_frames(latents[1]) < FEWEST_FRAMES:
        raise TooFewFrames(f"{config.data} holds {codec.num_frames(latents[1])} frames a clip: name videos")
    lineup = build_lineup(config, null_of(store), text_identity(store))
    _require_clips(config, latents)
    network, features, why = _network(config)
    skipped = _skipped(config, network, why, rest := len(store) - count)
    if config.strict and config.features and skipped[1:]:
        raise MissingArtifact("; ".join(one.reason for one in skipped[1:]))
    setting = RealSetting(
        store=store,
        captions=tuple(row.caption for row in rows),
        text=torch.from_numpy(np.stack([row.text for row in rows])),
        num_reference=min(config.reference_clips, rest) if network is not None and rest >= count else 0,
        seed=config.seed,
        codec=codec,
        network=network,
        batch_size=config.batch_size,
        device=config.device,
        identity={
            "codec": digest,
            "data": store.fingerprint,
            "features": features,
            "precision": config.precision,
            "device": torch.device(config.device).type,
        },
        notes=_notes(config, store, len(lineup.candidates)),
    )
    return setting, replace(lineup, skipped=(*skipped, *lineup.skipped))


def _require_clips(config: EvaluateConfig, latents: tuple[int, ...]) -> None:
    """Refuse students of clips of another size: a network would take any, and give figures of nothing."""
    for folder in chain.from_iterable(config.students.values()):
        if not (Path(folder) / CARD).is_file():
            continue  # skipped later, with its reason
        made = tuple(read_card(Path(folder))[0].latent_shape)
        if made != tuple(latents):
            raise StaleArtifact(
                f"{folder} makes latents {made}, {config.data} has {tuple(latents)}: prepare clips of the "
                "frames and size that it was trained on"
            )


def _require_device(name: str) -> None:
    """Raise InvalidValue for a device that torch does not know or find."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as missing:
        raise InvalidValue("device", name, f"cpu, or one that torch finds here: {missing}") from missing


def _network(config: EvaluateConfig) -> tuple[FrameEmbedding | None, str, str]:
    """Load the network for features; return it, what stands for it in fingerprints, and why there is none.

    Raises StaleArtifact for another digest than is asked for, and, where config.strict, MissingArtifact.
    """
    if not config.features:
        return None, "absent", "none named, features=FOLDER"
    try:
        network = load_embedding(config.features).to(config.device)
    except MissingArtifact as missing:
        if config.strict:
            raise
        return None, "absent", str(missing)
    found = model_digest(Path(config.features))
    if config.features_digest not in ("", found):
        raise StaleArtifact(
            f"{config.features} has the digest {found}, not features_digest={config.features_digest}"
        )
    return network, found, ""


def _skipped(config: EvaluateConfig, network: FrameEmbedding | None, why: str, rest: int) -> list[Skipped]:
    """What is not measured, and why; `rest`: clips of the data that are not sampled."""
    known = "attributes, paths, watermark"
    out = [Skipped(known, "nobody knows what these captions demand: figures of the small world alone")]
    if network is None:
        return [*out, Skipped("Frechet distance and likeness of captions", why)]
    if rest < config.num_clips:
        why = f"{config.num_clips} further clips or more are needed for the reference, the data has {rest}"
        out.append(Skipped("Frechet distance", why))
    if not network.speaks:
        out.append(Skipped("likeness of captions", f"{config.features} is no whole CLIP with its tokenizer"))
    return out


def _notes(config: EvaluateConfig, store: LatentStore, num_samplers: int) -> dict[str, Any]:
    """What the report says: which measures, what the captions are, whether a student has seen the clips."""
    folders = {folder for every in config.students.values() for folder in every}
    cards = [read_card(Path(one))[0] for one in folders if (Path(one) / CARD).is_file()]
    seen = any(card.sources.get("latents") == store.fingerprint for card in cards)
    whose = "that students were trained on, whose figures flatter" if seen else "of the clips given"
    return {
        "lead": f"{num_samplers} samplers on {config.num_clips} captions {whose}, a clip each.",
        "captions_are": f"captions {whose}",
        "data": f"{len(store)} clips, fingerprint {store.fingerprint[:16]}",
        "frechet": f"features of {Path(config.features).name}, larger at fewer clips",
        "columns": list(COLUMNS),
        "device": config.device,
        "precision": config.precision,
    }
