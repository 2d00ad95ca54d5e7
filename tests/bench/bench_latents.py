"""Random rows per second: `LatentStore` over a loader that opens the file anew for every row.

    python tests/bench/bench_latents.py [rows] [seconds per measurement]

Both read the same rows in the same order, alternating, in this process; the median of the rounds is
printed. The other loader does what FastVideo's does: open the Parquet file, read the row group that holds
the row, take the row out. It is tried on the artifact's own small row groups and on one group per file,
Parquet's habit.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raydistill.artifacts import LatentStore
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import write_artifact

ROUNDS = 5
SHAPES = {"small world, 4 KiB": (4, 16, 4, 4), "480p, 1 MiB": (16, 6, 52, 52)}


def write(folder: Path, shape: tuple[int, ...], rows: int, rows_per_group: int) -> Path:
    """Write one shard; return its folder."""
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal(shape, dtype=np.float32) for _ in range(rows))
    text = np.zeros((8, 32), np.float32)
    made = [latent_row(z, text, f"caption {i}", f"{i:064d}") for i, z in enumerate(latents)]
    shard = write_shard(folder, "00000", made, {"bench": 1}, rows_per_group=rows_per_group)
    write_artifact(folder, [shard], {"bench": 1})
    return folder


def reopening(folder: Path) -> Callable[[int], np.ndarray]:
    """The other loader."""
    path = folder / "00000.parquet"
    groups = pq.ParquetFile(path).metadata
    per_group = groups.row_group(0).num_rows

    def read(i: int) -> np.ndarray:
        row = pq.ParquetFile(path).read_row_group(i // per_group).to_pydict()
        at = i % per_group
        return np.frombuffer(row["latents_bytes"][at], row["latents_dtype"][at]).reshape(
            row["latents_shape"][at]
        )

    return read


def rate(read: Callable[[int], object], order: np.ndarray, seconds: float) -> float:
    """Rows per second."""
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        read(int(order[done % len(order)]))
        done += 1
    return done / spent


def main(rows: int = 256, seconds: float = 0.5) -> None:
    """Measure and print one JSON line per shape."""
    order = np.random.default_rng(1).permutation(rows)
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as place:
            small = write(Path(place, "small"), shape, rows, 4)
            large = write(Path(place, "large"), shape, rows, rows)
            store = LatentStore(small)
            reopened, one_group = reopening(small), reopening(large)
            assert all(np.array_equal(store.row(i).latents, reopened(i)) for i in range(0, rows, 37))
            readers = {"store": store.row, "reopening": reopened, "reopening, one group": one_group}
            rates = {key: [] for key in readers}
            for _ in range(ROUNDS):
                for key, read in readers.items():
                    rates[key].append(rate(read, order, seconds))
            median = {key: statistics.median(values) for key, values in rates.items()}
        ratios = {f"over {key}": round(median["store"] / median[key], 2) for key in list(median)[1:]}
        figures = {key: round(value, 1) for key, value in median.items()}
        print(json.dumps({"rows_per_s": figures, "ratio": ratios, "row": name}))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, float), sys.argv[1:], strict=False)))
