"""The generators behind `draws`: random numbers keyed by (seed, purpose, index), without torch.

Loader processes of the feed draw with them too, and need not import torch for it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def generators(seed: int, indices: Sequence[int], purpose: str) -> list[np.random.Generator]:
    """One Philox stream per index: key = (hash of seed and purpose, index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    return [
        np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))
        for index in indices
    ]


def integers(seed: int, indices: Sequence[int], purpose: str, high: int) -> list[int]:
    """Integers in [0, high), one per index. Raises ValueError unless high >= 1."""
    return [int(g.integers(high)) for g in generators(seed, indices, purpose)]
