"""What a load generator will send, drawn before anything is sent: arrival times, kinds, prompts, seeds."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.config.bench_serve import BenchServeConfig
from raydistill.errors import InvalidValue, MissingArtifact

Mode = Literal["cold", "warmup", "closed", "compare", "open"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to be."""

    number: int
    """Counted through the whole run."""
    kind: str
    """Label of its kind."""
    fields: Mapping[str, Any]
    """Body of POST /v1/videos."""
    at_s: float | None = None
    """When it is meant to arrive, in seconds of its phase; None: when a slot is free."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Requests under one load."""

    name: str
    mode: Mode
    requests: tuple[Request, ...]
    concurrency: int = 1
    """Of a closed loop."""
    rate: float | None = None
    """Of an open loop, per second."""
    utilisation: float | None = None
    """The share of the capacity that the rate is, where it was asked for so."""


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers that are a function of (seed, purpose) alone."""
    key = hashlib.sha256(f"raydistill/load/{seed}/{purpose}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def arrivals(seed: int, rate: float, count: int) -> list[float]:
    """Poisson arrival times in seconds, rising: a process of `rate` that has `count` of them in count / rate.

    Given their number, the arrivals of a Poisson process are as if thrown into its time at random. Without
    that, few requests would come at another rate than asked for. Every rate stretches the same draws, so
    rates differ by load and not by luck.
    """
    times = np.cumsum(generator(seed, "arrivals").exponential(1.0, size=count + 1))
    return (times[:-1] / times[-1] * count / rate).tolist()


def read_prompts(config: BenchServeConfig) -> list[str]:
    """Prompts of the settings or of their file. Raises MissingArtifact, InvalidValue."""
    if not config.prompts_file:
        return [one for one in config.prompts if one.strip()]
    try:
        lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
    except OSError as gone:
        raise MissingArtifact(f"prompts_file={config.prompts_file} cannot be read: {gone}") from gone
    except UnicodeDecodeError as broken:
        raise InvalidValue("prompts_file", config.prompts_file, f"not UTF-8: {broken}") from broken
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise InvalidValue("prompts_file", config.prompts_file, "a file with a prompt per line; it is empty")
    return prompts


def label(fields: Mapping[str, Any]) -> str:
    """Name a kind of request by its fields: 'plan=4 size=32x32'."""
    return " ".join(f"{key}={value}" for key, value in fields.items()) or "default"


class Draws:
    """Draws the requests of one phase after the other; counts their numbers."""

    def __init__(self, config: BenchServeConfig):
        self.config = config
        self.prompts = read_prompts(config)
        self.next_number = 0

    def mixed(self, count: int, at_s: Sequence[float | None] = ()) -> tuple[Request, ...]:
        """Return `count` requests of the mix, arriving at `at_s` if given; every phase has the same kinds."""
        weights = np.array([weight for weight, _ in self.config.kinds])
        kinds = generator(self.config.seed, "kinds").choice(
            len(weights), size=count, p=weights / weights.sum()
        )
        times = at_s or [None] * count
        return tuple(
            self._request(self.config.kinds[kind][1], at)
            for kind, at in zip(kinds.tolist(), times, strict=True)
        )

    def of_each_kind(self, count: int) -> tuple[Request, ...]:
        """Return `count` requests of every kind that a phase will send; none where only a cold start is."""
        mixed = self.config.closed_loops or self.config.open_loops
        kinds = [*([fields for _, fields in self.config.kinds] if mixed else []), *self.config.compare]
        return tuple(self._request(fields) for fields in kinds for _ in range(count))

    def in_turn(self, count: int) -> tuple[Request, ...]:
        """Return pairs of the two kinds to be compared, `count` requests or one more."""
        pairs = list[Request]()
        for _ in range((count + 1) // 2):
            first = self._request(self.config.compare[0])
            # The same seed and prompt: the pair differs in nothing but what is compared.
            same = {key: first.fields[key] for key in ("prompt", "seed")}
            pairs += [first, self._request({**same, **self.config.compare[1]}, name=self.config.compare[1])]
        return tuple(pairs)

    def _request(
        self, fields: Mapping[str, Any], at_s: float | None = None, name: Mapping[str, Any] | None = None
    ) -> Request:
        number = self.next_number
        self.next_number += 1
        drawn = int(generator(self.config.seed, f"prompt/{number}").integers(len(self.prompts)))
        body = {"prompt": self.prompts[drawn], "seed": self.config.seed + number, **fields}
        return Request(number=number, kind=label(fields if name is None else name), fields=body, at_s=at_s)


def closed_phases(config: BenchServeConfig, draws: Draws) -> list[Phase]:
    """Closed loops, by concurrency."""
    return [
        Phase(name=f"closed {width}", mode="closed", requests=draws.mixed(config.requests), concurrency=width)
        for width in config.closed_loops
    ]


def open_phases(config: BenchServeConfig, draws: Draws, capacity: float) -> list[Phase]:
    """Open loops by rising rate; `capacity` in requests per second is what utilisations refer to."""
    asked = [(rate, None) for rate in config.rates]
    asked += [(part * capacity, part) for part in config.utilisations if capacity > 0]
    phases = list[Phase]()
    for rate, part in sorted(asked, key=lambda pair: pair[0]):
        times = arrivals(config.seed, rate, config.requests)
        name = f"open {rate:.4g}/s" + (f" ({100 * part:.4g} %)" if part else "")
        phases.append(
            Phase(
                name=name,
                mode="open",
                requests=draws.mixed(config.requests, times),
                rate=rate,
                utilisation=part,
            )
        )
    return phases
