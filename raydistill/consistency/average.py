"""Moving average of weights, theta^- (CM, eq. 8)."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def moving_average_(target_params: Iterable[Tensor], source_params: Iterable[Tensor], decay: float) -> None:
    """In place: target <- decay target + (1 - decay) source, in the target's dtype; decay 0 copies exactly.

    Both iterables must have the same length, and shapes in the same order (ValueError, RuntimeError).
    """
    for target, source in zip(target_params, source_params, strict=True):
        target.lerp_(source.to(target), 1 - decay)
