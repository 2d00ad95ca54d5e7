"""Running means of loss terms, in whole and by noise level, over all workers."""

import torch
import torch.distributed as dist

from raydistill.experts.semantic import Losses

NUM_BUCKETS = 5


class Meter:
    """Sums per term and per fifth of the time axis since the last `read`."""

    def __init__(self):
        """Start empty; terms appear as they come."""
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, losses: Losses) -> None:
        """Count one micro-batch."""
        for name, term in losses.terms.items():
            # Bucket k holds t in (k, k + 1] / NUM_BUCKETS: a time on an edge is on the side nearer the data.
            bucket = (term.t.double().cpu() * NUM_BUCKETS - 1e-6).floor().long().clamp(0, NUM_BUCKETS - 1)
            sums = self._sums.setdefault(name, torch.zeros(2, NUM_BUCKETS, dtype=torch.float64))
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
                label = f"bucket/{k / NUM_BUCKETS:.1f}-{(k + 1) / NUM_BUCKETS:.1f}/{name}"
                means[label] = float(total[k] / count[k])
        self._sums = {}
        return means
