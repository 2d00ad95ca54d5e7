"""Appearance from images: decoded frames of the guess, before a critic that knows good ones (MCM, 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydistill import draws
from raydistill.config.stages import AppearanceConfig
from raydistill.consistency.augment import augment, draw_augmentation
from raydistill.consistency.losses import generator_score, gradient_penalty, hinge_fake, hinge_real
from raydistill.experts.semantic import Jumped, Losses, Term, Terms, add_up
from raydistill.models.frame_critic import pool_text
from raydistill.models.frame_features import FrameFeatures
from raydistill.models.protocols import VideoCodec
from raydistill.types import Batch, Images, Indices, Latents, Text, Times


@dataclass(frozen=True)
class Seen:
    """What the student's turn saw, detached: the net is frozen, the critic's turn reuses it."""

    frames: Tensor
    """Generated frames as the net saw them, (n, 3, h, w)."""
    maps: list[Tensor]
    """The net's features of those."""
    text: Tensor
    """Caption of each frame, pooled and centred, (n, d)."""
    index: Indices
    """Sample of each frame."""
    t: Times
    """Noise level of each frame's guess."""
    images: Images


@dataclass(frozen=True)
class FrameJudge:
    """The image critic with all that it looks through; only the critic is trained.

    Captions of clips speak of motion, those of images do not: each lane's mean caption is taken off, or the
    critic would tell the lanes apart by their words alone.
    """

    critic: nn.Module
    codec: VideoCodec
    features: FrameFeatures
    config: AppearanceConfig
    weight: float
    """Of the score in the student's loss."""
    seed: int
    caption_means: tuple[Tensor, Tensor]
    """Mean pooled caption of the clips and of the images, (d,)."""

    def look(self, batch: Batch, pair: Jumped, leaf: Latents) -> tuple[Terms, Seen]:
        """Return the generator's score of k frames of each guess, drawn anew for every sample."""
        if batch.images is None:
            raise ValueError("the image critic needs an image lane")
        k = min(self.config.num_frames, self.codec.num_frames(leaf.shape[2]))
        frames = self.codec.decode_frames(leaf, self._picked(batch.index, leaf, k), checkpoint=True)
        index = batch.index.repeat_interleave(k)
        frames = self._augmented(frames.transpose(1, 2).flatten(0, 1), index, k, "fake")
        maps = self.features(frames)
        text = self._captions(batch.text, 0).repeat_interleave(k, dim=0)
        t = pair.t.repeat_interleave(k)
        terms = {"appearance": Term(self.weight, generator_score(self.critic(maps, text)), t)}
        return terms, Seen(frames.detach(), [m.detach() for m in maps], text, index, t, batch.images)

    def turn(self, seen: Seen) -> Losses:
        """Return the critic's hinge on real frames and on those of the student's turn (MCM, eq. 5)."""
        images = seen.images
        with torch.no_grad():
            first = torch.zeros(len(images.index), 1, dtype=torch.long)
            frames = self.codec.decode_frames(images.latents, first).flatten(1, 2)
            frames = self._augmented(frames, images.index, 1, "real")
            maps = self.features(frames)
        clean = torch.zeros(len(frames), dtype=torch.float64)
        real = hinge_real(self.critic(maps, self._captions(images.text, 1)))
        terms = {"image_critic_real": Term(1.0, real, clean)}
        fake = hinge_fake(self.critic(seen.maps, seen.text))
        terms["image_critic_fake"] = Term(1.0, fake, seen.t)
        if self.config.gradient_penalty:
            value = self._penalty(seen, frames)
            clean = torch.zeros(len(value), dtype=torch.float64)
            terms["gradient_penalty"] = Term(self.config.gradient_penalty, value, clean)
        return add_up(terms)

    def _penalty(self, seen: Seen, real: Tensor) -> Tensor:
        """Slope of the critic in the net's features between a real and a generated frame (WGAN-GP, eq. 3)."""
        count = min(len(real), len(seen.frames))
        # Evenly over both, so that micro-batches pair the same frames as the whole batch would.
        rows, others = (torch.arange(count) * len(x) // count for x in (seen.frames, real))
        a = draws.uniform(self.seed, seen.index[rows], "between").to(real).view(-1, 1, 1, 1)
        rows, others = rows.to(real.device), others.to(real.device)
        with torch.no_grad():
            maps = self.features(a * real[others] + (1 - a) * seen.frames[rows])
        leaves = [m.requires_grad_() for m in maps]
        logits = self.critic(leaves, seen.text[rows])
        scores = torch.stack([x.flatten(1).sum(dim=1) for x in logits]).sum(dim=0)
        return gradient_penalty(scores, leaves)

    def _picked(self, index: Indices, leaf: Latents, k: int) -> Tensor:
        """Return k different frames of each sample, (b, k), in the order drawn."""
        count = self.codec.num_frames(leaf.shape[2])
        order = draws.uniform(self.seed, index, "frames", (count,)).argsort(dim=1)
        return order[:, :k].to(leaf.device)

    def _augmented(self, frames: Tensor, index: Indices, k: int, side: str) -> Tensor:
        """DiffAugment, keyed by the sample and the frame's place in it."""
        if not self.config.augment:
            return frames
        u = draws.uniform(self.seed, index[::k], f"augmentation/{side}", (k, 7)).flatten(0, 1)
        return augment(frames, draw_augmentation(u.to(frames)))

    def _captions(self, text: Text, lane: int) -> Tensor:
        return pool_text(text) - self.caption_means[lane].to(text)
