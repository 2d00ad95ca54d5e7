"""Prometheus metrics, computed from the job store: every replica answers the same, and none counts twice."""

import json
from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from raydistill.service.journal import BUCKETS
from raydistill.service.store import JobStore
from raydistill.service.tables import TOTALS

COUNTERS = {
    "jobs_accepted": "Jobs written into the queue",
    "jobs_completed": "Videos published",
    "jobs_failed": "Jobs that failed, by code",
    "jobs_cancelled": "Jobs cancelled or deleted before they ended",
    "passes": "Network passes, by expert: a step of the guided teacher is two",
    "takeovers": "Jobs taken over from a replica that went silent",
}
HISTOGRAMS = {
    "wait_seconds": "From acceptance to the first claim",
    "stage_seconds": "Work on a stage, without waiting for it",
    "job_seconds": "From acceptance to the end",
}
LABELS = {
    "jobs_accepted": ("model", "bundle"),
    "jobs_completed": ("model", "bundle"),
    "jobs_failed": ("model", "bundle", "code"),
    "jobs_cancelled": ("model", "bundle"),
    "passes": ("model", "bundle", "expert"),
    "takeovers": ("model", "bundle"),
    "wait_seconds": ("model", "bundle"),
    "stage_seconds": ("model", "bundle", "stage"),
    "job_seconds": ("model", "bundle", "state"),
}


class _FromStore(Collector):
    def __init__(self, store: JobStore):
        self.store = store

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        rows = defaultdict[str, list[tuple[dict[str, str], float]]](list)
        with self.store.database.read() as connection:
            for name, labels, value in connection.execute(sa.select(TOTALS)).all():
                rows[name].append((json.loads(labels), value))
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"raydistill_{name}", text, labels=LABELS[name])
            for labels, value in rows[name]:
                counter.add_metric([labels[label] for label in LABELS[name]], value)
            yield counter
        for name, text in HISTOGRAMS.items():
            yield _histogram(name, text, rows[f"{name}_bucket"], rows[f"{name}_sum"])

    def _gauges(self) -> Iterator[Metric]:
        load, workers = self.store.load(), self.store.workers()
        for name, text, value in (
            ("queued_jobs", "Jobs that wait for their first claim", load.queued),
            ("running_jobs", "Jobs begun and not ended", load.running),
            ("leased_jobs", "Jobs that a live replica works on", load.leased),
            ("remaining_cost", "Cost of all that waits or runs, in passes times megapixels", load.remaining),
            ("oldest_wait_seconds", "Age of the oldest job that waits", load.oldest_s),
            ("replicas", "Sampler replicas that were heard of", len(workers)),
        ):
            yield GaugeMetricFamily(f"raydistill_{name}", text, value=value)
        by_stage = GaugeMetricFamily("raydistill_stage_cost", "Remaining cost by stage", labels=("stage",))
        for stage, cost in load.by_stage.items():
            by_stage.add_metric([stage], cost)
        yield by_stage


def _histogram(
    name: str,
    text: str,
    buckets: list[tuple[dict[str, str], float]],
    sums: list[tuple[dict[str, str], float]],
) -> HistogramMetricFamily:
    """Add up the buckets: the store has what fell into each, Prometheus wants what fell below its end."""
    family = HistogramMetricFamily(f"raydistill_{name}", text, labels=LABELS[name])
    counts = defaultdict[tuple[str, ...], dict[str, float]](dict)
    for labels, value in buckets:
        counts[tuple(labels[label] for label in LABELS[name])][labels["le"]] = value
    totals = {tuple(labels[label] for label in LABELS[name]): value for labels, value in sums}
    for key, held in counts.items():
        below, so_far = list[tuple[str, float]](), 0.0
        for bound in (*(f"{one:g}" for one in BUCKETS), "+Inf"):
            so_far += held.get(bound, 0.0)
            below.append((bound, so_far))
        family.add_metric(list(key), below, totals.get(key, 0.0))
    return family


def exposition(store: JobStore) -> bytes:
    """The page that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(_FromStore(store))
    return generate_latest(registry)
