"""Running means of loss terms, in whole and by noise level, over all workers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist

from raydistill.consistency.schedule import SAME_TIME
from raydistill.experts.semantic import Losses


class Meter:
    """Sums per term and noise level since the last `read`."""

    def __init__(self, levels: Sequence[float]):
        """Start empty; terms appear as they come. `levels`: increasing times between which to sum apart."""
        self._labels = [f"{low:.3f}-{high:.3f}" for low, high in pairwise(levels)]
        self._inner = torch.tensor(levels[1:-1], dtype=torch.float64) + SAME_TIME
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, losses: Losses) -> None:
        """Count one micro-batch."""
        for name, term in losses.terms.items():
            # A time on an edge is on the side nearer the data.
            bucket = torch.bucketize(term.t.double().cpu(), self._inner)
            sums = self._sums.setdefault(name, torch.zeros(2, len(self._labels), dtype=torch.float64))
            sums[0].index_add_(0, bucket, term.value.double().cpu())
            sums[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))

    def read(self) -> dict[str, float]:
        """Return means `loss/<term>`, `bucket/<lo>-<hi>/<term>`, and start again; every rank calls this."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            moved = sums.to(device)
            dist.all_reduce(moved)
            sums = moved.cpu()
        means: dict[str, float] = {}
        for name, (total, count) in zip(names, sums, strict=True):
            means[f"loss/{name}"] = float(total.sum() / count.sum())
            for k in count.nonzero().flatten().tolist():
                means[f"bucket/{self._labels[k]}/{name}"] = float(total[k] / count[k])
        self._sums = {}
        return means
