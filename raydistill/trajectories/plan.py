"""Which sample is trained on when: a pure function of the global sample index.

Sample g of a run is row `row` of source `source`, on any number of workers and after any resume, so a run's
position in its data is one integer. Nothing here knows Ray, files or state.

Sources take turns in exact proportions. After every n samples each source has given within 1 of its weight's
share of n, by the schedule of Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980):
the k-th sample of a source has a window of places, and the one whose window closes first goes first. Taking
the source with the largest deficit, the usual rule, breaks that bound from a handful of sources on. The
schedule repeats after as many samples as the weights' common denominator; one period is kept, so `item` is
O(1).

Rows come in an order keyed by (seed, source, epoch): a Feistel network on the bits of the position, repeated
until it lands below the number of rows ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). It is a bijection computed in O(1), so every row comes once per epoch, without an array of
them.

Anything else drawn for sample g, such as a flag or a second row of another lane, is keyed by g (see `draws`)
and so joins without moving what is here.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from raydistill.artifacts import fingerprint
from raydistill.errors import InvalidValue

VERSION = 1
"""Of the mapping from g to row; raised when it changes, since old checkpoints then mean other samples."""
LONGEST_PERIOD = 100_000
_ROUNDS = 8


class Item(NamedTuple):
    """What the plan says about one sample."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]: nobody asks a sample for tuple.index
    """Global sample index, 0 or more: the key of its random numbers."""
    source: str
    """Name of the source."""
    epoch: int
    """How often the source has been gone through before."""
    row: int
    """Row of the source, 0 .. num_rows - 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of rows, and its share of the samples. Raises InvalidValue."""

    name: str
    num_rows: int
    """1 or more."""
    weight: float = 1.0
    """Share of the samples relative to the other sources, above 0."""
    digest: str = ""
    """Fingerprint of the rows: other contents make another plan."""

    def __post_init__(self):
        """Check ranges."""
        where = f"source '{self.name}'"
        if not self.name:
            raise InvalidValue("source.name", self.name, "must not be empty")
        if self.num_rows < 1:
            raise InvalidValue(f"{where}.num_rows", self.num_rows, "a source needs at least one row")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InvalidValue(
                f"{where}.weight", self.weight, "must be finite and above 0; leave the source out instead"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Global sample index -> sample. Raises InvalidValue, also if the weights have no short common period."""

    seed: int
    """0 or more."""
    global_batch: int
    """Samples per optimiser step over all workers, 1 or more."""
    sources: tuple[Source, ...]
    unit: int = 1
    """So many samples in a row are one source's turn; it divides the global batch. Proportions are then kept
    among turns."""

    def __post_init__(self):
        """Check ranges, and that the weights can be kept exactly."""
        if self.seed < 0:
            raise InvalidValue("seed", self.seed, "must be 0 or more")
        if self.global_batch < 1:
            raise InvalidValue("global_batch", self.global_batch, "must be at least 1")
        if self.unit < 1 or self.global_batch % self.unit:
            raise InvalidValue("unit", self.unit, f"must divide global_batch = {self.global_batch}")
        names = [s.name for s in self.sources]
        if not names or len(set(names)) < len(names):
            raise InvalidValue("sources", names, "must be one or more, of different names")
        _parts(tuple(s.weight for s in self.sources))

    @property
    def proportions(self) -> dict[str, Fraction]:
        """Each source's exact share of the samples; they sum to 1."""
        parts = _parts(tuple(s.weight for s in self.sources))
        return {s.name: Fraction(part, sum(parts)) for s, part in zip(self.sources, parts, strict=True)}

    def item(self, g: int) -> Item:
        """Return sample g, 0 or more. O(1)."""
        source, nth = self._turn(g)
        epoch, position = divmod(nth, source.num_rows)
        return Item(
            g, source.name, epoch, _permuted(position, source.num_rows, self._order_key(source, epoch))
        )

    def substitutes(self, g: int) -> Iterator[int]:
        """Yield the other rows of sample g's source, in the order to try them if its own is unreadable."""
        source, nth = self._turn(g)
        epoch, position = divmod(nth, source.num_rows)
        key = self._order_key(source, epoch)
        for ahead in range(1, source.num_rows):
            yield _permuted((position + ahead) % source.num_rows, source.num_rows, key)

    def share(self, world_size: int) -> int:
        """Return the samples per step of one worker. Raises InvalidValue unless `world_size` divides them."""
        if world_size < 1 or self.global_batch % world_size:
            raise InvalidValue(
                "global_batch", self.global_batch, f"must be a multiple of the {world_size} workers"
            )
        return self.global_batch // world_size

    def indices(self, step: int, rank: int, world_size: int) -> range:
        """Return the global sample indices of one worker in one step: its slice of the global batch."""
        share = self.share(world_size)
        start = step * self.global_batch + rank * share
        return range(start, start + share)

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of the plan: all of it JSON, `step` the only part that moves."""
        sources = [[s.name, s.num_rows, str(self.proportions[s.name]), s.digest] for s in self.sources]
        whole = {"version": VERSION, "seed": self.seed, "global_batch": self.global_batch}
        turns = {"unit": self.unit} if self.unit > 1 else {}  # older checkpoints know of none
        return {**whole, **turns, "sources": fingerprint(sources), "step": step}

    def _turn(self, g: int) -> tuple[Source, int]:
        """Return the source of sample g, and how many of its samples came before."""
        if g < 0:
            raise InvalidValue("g", g, "a global sample index is 0 or more")
        parts = _parts(tuple(s.weight for s in self.sources))
        turn, within = divmod(g, self.unit)
        period, place = divmod(turn, sum(parts))
        which, before = _schedule(parts)[place]
        return self.sources[which], (period * parts[which] + before) * self.unit + within

    def _order_key(self, source: Source, epoch: int) -> tuple[int, ...]:
        return _round_keys(self.seed, source.name, epoch)


@lru_cache(maxsize=64)
def _parts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Return coprime integers in the exact proportions of the weights; raises InvalidValue if too large.

    A float is taken as the fraction that it stands for: 0.1 as 1/10, 1 / 3 as 1/3.
    """
    fractions = [Fraction(w).limit_denominator(LONGEST_PERIOD) for w in weights]
    largest = max(weights)
    if any(f <= 0 or abs(float(f) - w) > 1e-12 * largest for f, w in zip(fractions, weights, strict=True)):
        raise _too_long(weights)
    common = math.lcm(*(f.denominator for f in fractions))
    parts = [int(f * common) for f in fractions]
    shared = math.gcd(*parts)
    if sum(parts) // shared > LONGEST_PERIOD:
        raise _too_long(weights)
    return tuple(part // shared for part in parts)


def _too_long(weights: tuple[float, ...]) -> InvalidValue:
    rounded = [max(1, round(w / sum(weights) * 1000)) for w in weights]
    expected = (
        f"must be in proportions of whole numbers that sum to at most {LONGEST_PERIOD}, for example {rounded}"
    )
    return InvalidValue("weights of the sources", list(weights), expected)


@lru_cache(maxsize=16)
def _schedule(parts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return one period of turns: for every place (source, how often it had its turn earlier in the period).

    With m sources and c = 1 / (2m - 2), turn k of a source with share w may come from place (k + c) / w on,
    and must before its deficit w n - k exceeds 1 - c. Tijdeman: such a schedule exists; and where one exists,
    earliest deadline first finds it. Then |count - w n| <= 1 - c at every n, and a period ends with all
    counts exact.
    """
    period, m = sum(parts), len(parts)
    if m == 1:
        return ((0, 0),)
    unit = 2 * m - 2
    turns = [
        (
            -(-(k * unit + 1) * period // (unit * part)),
            ((k + 1) * unit - 1) * period // (unit * part) + 1,
            which,
            k,
        )
        for which, part in enumerate(parts)
        for k in range(part)
    ]
    turns.sort()
    waiting: list[tuple[int, int, int]] = []
    order, released = [], 0
    for place in range(1, period + 1):
        while released < period and turns[released][0] <= place:
            _, *turn = turns[released]
            heapq.heappush(waiting, (turn[0], turn[1], turn[2]))
            released += 1
        _, which, k = heapq.heappop(waiting)
        order.append((which, k))
    return tuple(order)


@lru_cache(maxsize=256)
def _round_keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    """Return the 64-bit keys of the Feistel rounds."""
    stem = f"{seed}/order/{epoch}/{name}"
    drawn = b"".join(hashlib.sha256(f"{half}/{stem}".encode()).digest() for half in range(_ROUNDS // 4))
    return tuple(int.from_bytes(drawn[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _permuted(position: int, size: int, keys: tuple[int, ...]) -> int:
    """Return where a keyed bijection of [0, size) takes a position; some 4 passes at most on average."""
    half = max(2, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) >> 64 - half)
        position = left << half | right
        if position < size:
            return position


def _mixed(x: int) -> int:
    """Spread 64 bits over 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
