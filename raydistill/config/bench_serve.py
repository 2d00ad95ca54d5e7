"""What `jobs/bench_serve.py` takes: which load, against which server, and when it stops."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from raydistill.config.checks import at_least, positive
from raydistill.errors import InvalidValue

MOST_REQUESTS = 100_000
LONGEST_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """One kind of request and how often it comes."""

    weight: float = 1.0
    """Its share is this over the sum of all weights."""
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields of POST /v1/videos, e.g. {plan: "2+tail", size: 32x32, num_inference_steps: 4}. Prompt and seed
    are filled in where they are not given."""

    def __post_init__(self):
        """Check the range."""
        if not 0 <= self.weight < float("inf"):
            raise InvalidValue("mix", self.weight, "a weight of 0 or more")


@dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    """Load on a running server: latencies, goodput, what is shed, what is lost. Nothing is sent twice."""

    base_url: str = "http://127.0.0.1:8000"
    """Of the server: http or https, without a path's trailing slash."""
    api_key_env: str = ""
    """Name of the environment variable that holds the API key; empty: none is sent."""
    output: str = "build/bench_serve"
    """Receives results.json, requests.jsonl, report.md and the plots; an earlier run's are replaced."""
    follow: Literal["events", "poll", "sync"] = "events"
    """How a request learns that its video is ready: server-sent events, polls, or one call that waits."""
    content: bool = True
    """Fetch the video and look whether it is an mp4; the latency then ends when its last byte is here."""
    poll_s: float = 0.0
    """Seconds between polls; 0: what the server says in openai-poll-after-ms."""
    requests: int = 100
    """Of each phase, i.e. of each rate and each concurrency."""
    timeout_s: float = 300.0
    """Of each phase. What is on its way then is counted as unfinished; what was not sent, as not sent."""
    call_timeout_s: float = 30.0
    """Of a single HTTP call that is to be answered at once."""
    ready_s: float = 30.0
    """How long to wait for the server to answer at all, before anything is sent."""
    warmup: int = 2
    """Requests of each kind before the first phase; they are in no figure."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    """Closed loop: so many requests are open at any time, a phase each."""
    rates: tuple[float, ...] = ()
    """Open loop: Poisson arrivals, so many requests per second on average, a phase each."""
    utilisations: tuple[float, ...] = (0.5, 0.8, 1.2)
    """Open loop at so much of the capacity, which is the highest throughput of the closed loops."""
    capacity_concurrency: int = 8
    """A closed loop of this width is added where utilisations are asked for and `concurrency` is empty."""
    deadline_s: float = 10.0
    """Goodput counts the videos that are there so soon after their intended arrival."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "a red square moves slowly left over a plain background",
            "a blue square moves quickly left over a striped background",
            "a green circle moves slowly up over a shaded background",
            "a yellow circle moves quickly down over a plain background",
        ]
    )
    """One is drawn for each request."""
    prompts_file: str = ""
    """Text file with a prompt per line, instead of `prompts`."""
    mix: list[MixConfig] = field(default_factory=list[MixConfig])
    """Kinds of requests; empty: one kind, with the server's defaults."""
    compare: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Two sets of request fields, e.g. [{plan: "4"}, {plan: teacher50}]: sent in turn, one at a time, with
    equal prompts and seeds; the report has the second's median over the first's. Empty: none."""
    seed: int = 0
    """Keys arrivals, kinds and prompts. Request number n of the run asks for the video seed `seed` + n."""
    num_draws: int = 1000
    """Bootstrap resamplings behind each 95 % interval."""
    cold_start: bool = False
    """First wait until the server has no sampler replicas, send one request, and take its time."""
    cold_wait_s: float = 600.0
    """How long to wait for that."""
    kills: int = 0
    """SIGKILL so many sampler processes in each open-loop phase (without any: in each closed loop). Only on
    this machine and through a loopback address."""
    kill_every_s: float = 0.0
    """Seconds before the first kill and between kills."""
    kill_stage: Literal["encode", "denoise", "decode"] = "denoise"
    """Only processes that run this stage are killed."""
    cancel_unfinished: bool = True
    """Cancel what a phase left, after it was counted, so that it is not in the way of the next."""

    def __post_init__(self):
        """Check ranges."""
        for name in ("timeout_s", "call_timeout_s", "deadline_s", "ready_s", "cold_wait_s"):
            positive(name, getattr(self, name))
            _at_most(name, getattr(self, name), LONGEST_S)
        for name in ("warmup", "kills", "kill_every_s", "poll_s", "seed"):
            at_least(name, getattr(self, name), 0)
        at_least("requests", self.requests, 1)
        _at_most("requests", self.requests, MOST_REQUESTS)
        _at_most("warmup", self.warmup, 100)
        _at_most("poll_s", self.poll_s, 60)
        _at_most("seed", self.seed, 2**30)
        at_least("num_draws", self.num_draws, 20)
        _at_most("num_draws", self.num_draws, 100_000)
        _check_url(self.base_url)
        if self.api_key_env and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise InvalidValue("api_key_env", self.api_key_env, "the name of an environment variable")
        self._check_load()
        self._check_requests()
        self._check_kills()

    def _check_load(self) -> None:
        at_least("capacity_concurrency", self.capacity_concurrency, 1)
        for key, values, most in (
            ("concurrency", self.concurrency, 1024),
            ("rates", self.rates, 10_000),
            ("utilisations", self.utilisations, 10),
        ):
            if any(not 0 < value <= most for value in values) or len(set(values)) < len(values):
                raise InvalidValue(key, values, f"different numbers, above 0 and at most {most}")
        if not (self.open_loops or self.concurrency or self.compare or self.cold_start):
            raise InvalidValue("concurrency", (), "something to do: this, rates, compare or cold_start")

    def _check_requests(self) -> None:
        if not self.prompts_file and not [one for one in self.prompts if one.strip()]:
            raise InvalidValue("prompts", self.prompts, "one or more, or prompts_file")
        if self.mix and not sum(one.weight for one in self.mix):
            raise InvalidValue("mix", [one.weight for one in self.mix], "weights that are not all 0")
        if self.compare and (len(self.compare) != 2 or self.compare[0] == self.compare[1]):
            raise InvalidValue("compare", self.compare, "two different sets of request fields")

    def _check_kills(self) -> None:
        if bool(self.kills) != bool(self.kill_every_s):
            raise InvalidValue("kills", self.kills, "together with kill_every_s: how many, and how often")
        if not self.kills:
            return
        if not is_loopback(self.base_url):
            raise InvalidValue("base_url", self.base_url, "a loopback address: kills are for this machine")
        if not (self.open_loops or self.concurrency):
            raise InvalidValue("kills", self.kills, "a load to kill under: rates, utilisations, concurrency")
        if self.kills * self.kill_every_s >= self.timeout_s:
            raise InvalidValue("kills", self.kills, "so few that kills * kill_every_s is below timeout_s")

    @property
    def open_loops(self) -> tuple[float, ...]:
        """Rates and utilisations together: empty if no phase is an open loop."""
        return (*self.rates, *self.utilisations)

    @property
    def closed_loops(self) -> tuple[int, ...]:
        """Concurrencies, with the one that measures the capacity."""
        added = (self.capacity_concurrency,) if self.utilisations and not self.concurrency else ()
        return (*self.concurrency, *added)

    @property
    def kinds(self) -> list[tuple[float, Mapping[str, Any]]]:
        """(weight, fields) of each kind of request."""
        return [(one.weight, one.fields) for one in self.mix] or [(1.0, {})]


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine by its name or number alone."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_url(url: str) -> None:
    wrong = InvalidValue("base_url", url, "http://HOST:PORT or https://HOST, no password, no question mark")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise wrong
    if parts.query or parts.fragment or url.endswith("/"):
        raise wrong


def _at_most(key: str, value: float, high: float) -> None:
    if not value <= high:
        raise InvalidValue(key, value, f"at most {high:g}")
