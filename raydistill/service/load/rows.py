"""What a load run knows of its requests: a row per request, a record per phase, and how they add up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raydistill.service.load.plan import Phase

Outcome = Literal["not_sent", "sent", "unfinished", "completed", "failed", "cancelled", "shed", "error"]
ACCEPTED: tuple[Outcome, ...] = ("completed", "failed", "cancelled", "unfinished")


@dataclass(kw_only=True)
class Row:
    """What happened to one request. Times are seconds since its phase began, None for what did not happen."""

    phase: str
    number: int
    kind: str
    seed: int | None = None
    intended_s: float | None = None
    """When it was meant to arrive; in a closed loop, when its slot was free."""
    sent_s: float | None = None
    accepted_s: float | None = None
    started_s: float | None = None
    """First sight of it being in progress."""
    preview_s: float | None = None
    """First preview frame; only events show it."""
    done_s: float | None = None
    """When its end was learned."""
    ended_s: float | None = None
    """When all of it was here: as done_s, or the content's last byte."""
    id: str = ""
    outcome: Outcome = "not_sent"
    code: str = ""
    """Why it was shed, refused or failed."""
    content_code: str = ""
    """Why there is no video though it completed."""
    last_status: str = ""
    """What the server said when it was last asked."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, from the server."""
    attempt: int | None = None
    polls: int = 0
    broken_reads: int = 0
    """Reads of its state that failed and were done again; reading again changes nothing for the server."""
    content_bytes: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the server took it."""
        return self.accepted_s is not None

    @property
    def latency_s(self) -> float | None:
        """Seconds from the intended arrival until the video was here; None if it never was.

        From the intended arrival, not from the sending: a server that makes its clients wait would otherwise
        be measured at the moments that suit it (coordinated omission). The times were drawn beforehand, and a
        request that left late has waited since then, whoever was to blame.
        """
        if self.outcome != "completed" or self.content_code:
            return None
        return _apart(self.ended_s, self.intended_s)

    @property
    def preview_after_s(self) -> float | None:
        """Seconds from the intended arrival to the first preview frame."""
        return _apart(self.preview_s, self.intended_s)

    @property
    def queue_s(self) -> float | None:
        """Seconds in the queue: as the server says, else from being accepted to being seen in progress."""
        return self.timings.get("queue_s", _apart(self.started_s, self.accepted_s))

    @property
    def lag_s(self) -> float | None:
        """Seconds that this program was late in sending it."""
        return _apart(self.sent_s, self.intended_s)

    def stages(self) -> dict[str, float] | None:
        """Split the latency into queue, encode, denoise, decode, rest; None where the server gave no times.

        The rest is what lies between the stages and the client: network, storage, polls, waiting for a lease.
        """
        named = {name: self.timings.get(f"{name}_s") for name in ("queue", "encode", "denoise", "decode")}
        if self.latency_s is None or named["denoise"] is None:
            return None
        split = {name: value or 0.0 for name, value in named.items()}
        return {**split, "rest": self.latency_s - sum(split.values())}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, what follows from them included."""
        return {
            **asdict(self),
            "latency_s": self.latency_s,
            "preview_after_s": self.preview_after_s,
            "queue_s": self.queue_s,
        }


def _apart(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start


@dataclass(kw_only=True)
class Kill:
    """A sampler process that was killed, or why none was."""

    at_s: float
    worker_id: str = ""
    pid: int | None = None
    why_not: str = ""


@dataclass(kw_only=True)
class Record:
    """A phase as it went."""

    phase: Phase
    rows: list[Row]
    offset_s: float = 0.0
    """When it began, in seconds of the run."""
    seconds: float | None = None
    """How long it took; None while it runs."""
    timed_out: bool = False
    kills: list[Kill] = field(default_factory=list)

    @classmethod
    def of(cls, phase: Phase, offset_s: float = 0.0) -> "Record":
        """Return the record of a phase that begins."""
        rows = [
            Row(
                phase=phase.name,
                number=one.number,
                kind=one.kind,
                seed=one.fields.get("seed"),
                intended_s=one.at_s,
            )
            for one in phase.requests
        ]
        return cls(phase=phase, rows=rows, offset_s=offset_s)

    def counts(self) -> Counter[str]:
        """Rows by outcome."""
        return Counter(row.outcome for row in self.rows)

    def give_up(self, now_s: float) -> None:
        """End the phase: an answer that is still awaited will not be."""
        self.seconds = now_s
        for row in self.rows:
            if row.outcome == "sent":
                row.outcome, row.code = "error", "no_answer"


@dataclass(kw_only=True)
class Run:
    """All phases, and what else was learned. Filled while it runs: an interrupted run has its part."""

    started_at: float = 0.0
    """Seconds since 1970."""
    records: list[Record] = field(default_factory=list)
    models: list[Any] = field(default_factory=list)
    """`data` of GET /v1/models."""
    capacity_per_s: float | None = None
    cold_start: dict[str, Any] | None = None
    finished: bool = False


def accounting(rows: Sequence[Row]) -> dict[str, Any]:
    """Add up what became of the requests.

    accepted = completed + failed + cancelled + unfinished must hold of different ids; `balanced` says whether
    it does, `duplicates` names the ids that were given to two requests, and `ids` all accepted ones that did
    not complete.
    """
    counts = Counter(row.outcome for row in rows)
    ids = [row.id for row in rows if row.accepted and row.id]
    ended = {name: counts[name] for name in ACCEPTED}
    return {
        "requests": len(rows),
        "sent": sum(row.sent_s is not None for row in rows),
        "not_sent": counts["not_sent"],
        "shed": counts["shed"],
        "errors": counts["error"],
        "accepted": sum(row.accepted for row in rows),
        **ended,
        "balanced": len(set(ids)) == sum(ended.values()),
        "duplicates": sorted(name for name, count in Counter(ids).items() if count > 1),
        "ids": {name: [row.id for row in rows if row.outcome == name] for name in ACCEPTED[1:]},
        "unannounced": [row.id for row in rows if row.outcome == "completed" and row.done_s is None],
        "restarted": sum((row.attempt or 1) > 1 for row in rows),
    }
