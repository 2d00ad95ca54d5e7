"""Text encoders. The small world's needs no weights: one fixed vector per word."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from raydistill.artifacts import LatentStore, write_atomically
from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.types import Text

NULL = "null_text.safetensors"
"""The empty caption's embedding, in a folder of latents and in a student's."""
WORD_VECTORS = "word_vectors"
STOP_WORDS = frozenset({"a", "an", "the", "of", "moves", "move", "over", "on", "in", "is", "background"})


class WordVectors:
    """A caption as a bag of fixed random word vectors, drawn from the word's own hash.

    Unknown words need no vocabulary: two encoders agree on every word. Words beyond `num_tokens` are dropped.
    """

    def __init__(self, num_tokens: int = 8, width: int = 32):
        """Keep at most `num_tokens` words; each is a unit-variance vector of `width`."""
        self.num_tokens, self.width = num_tokens, width

    @property
    def identity(self) -> dict[str, object]:
        """What shapes the embedding, for fingerprints."""
        return {"kind": WORD_VECTORS, "version": 1, "num_tokens": self.num_tokens, "width": self.width}

    def _vector(self, word: str) -> np.ndarray:
        key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(self.width)

    def __call__(self, captions: Sequence[str]) -> Text:
        """Embed captions: float32 (b, num_tokens, width), zero after the last word; '' is the null text."""
        out = np.zeros((len(captions), self.num_tokens, self.width), dtype=np.float32)
        for row, caption in zip(out, captions, strict=True):
            words = [w for w in re.findall(r"[^\W_]+", caption.lower()) if w not in STOP_WORDS]
            for token, word in zip(row, words, strict=False):
                token[:] = self._vector(word)
        return torch.from_numpy(out)


def null_text(like: Text) -> Float[Tensor, "l d"]:
    """Embed the empty caption by word vectors, for guidance, in the sizes of a batch of texts (b, l, d)."""
    return WordVectors(like.shape[1], like.shape[2])([""])[0].to(like)


def save_null(folder: Path, text: Float[Tensor, "l d"]) -> None:
    """Write the empty caption's embedding."""
    write_atomically(folder / NULL, save({"text": text.float().contiguous()}))


def load_null(folder: Path) -> Float[Tensor, "l d"]:
    """Inverse of `save_null`, float32. Raises MissingArtifact, CorruptArtifact."""
    path = folder / NULL
    if not path.is_file():
        raise MissingArtifact(f"no {NULL} in {folder}, the empty caption for guidance: prepare again")
    try:
        return load(path.read_bytes())["text"]
    except (ValueError, KeyError, OSError, RuntimeError) as broken:
        raise CorruptArtifact(f"{path} holds no embedding: {broken}") from broken


def text_identity(store: LatentStore) -> dict[str, Any]:
    """Return what stands for the encoder of prepared latents' captions: its kind, and what shapes it."""
    return {"kind": WORD_VECTORS, **store.manifest.identity.get("models", {}).get("text", {})}


def encoder_of(store: LatentStore) -> str:
    """Return what embedded the captions of prepared latents: word vectors, or the class of a pipeline."""
    return text_identity(store)["kind"]


def null_of(store: LatentStore) -> Float[Tensor, "l d"]:
    """Return the empty caption's embedding by the encoder of prepared latents, float32.

    Raises MissingArtifact, and CorruptArtifact for one of another shape than the captions.
    """
    text = torch.from_numpy(store.row(0).text.copy())
    null = null_text(text[None]) if encoder_of(store) == WORD_VECTORS else load_null(store.folder)
    if null.shape != text.shape:
        raise CorruptArtifact(f"{store.folder / NULL} is of shape {tuple(null.shape)}, captions {text.shape}")
    return null
