"""What the server adds to the sampler, what a second worker brings, and what few steps save through it.

    python tests/bench/bench_serve.py [requests] [bundle folder]

The server is real HTTP in this process, the store an SQLite file, workers are processes; Ray Serve's own
hop is left out here, `jobs/bench_serve.py` measures it with the rest. All ways run in turn.
"""

import json
import multiprocessing
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from bundle_cases import save_untrained_bundle
from service_cases import Server, settings, start_worker

from raydistill.config.serve import WorkerConfig
from raydistill.service import video
from raydistill.service.engine import Engine

PROMPT = "a red circle moves slowly left over a plain background"
POLICIES = {"saved after every step": 0.0, "not saved between steps": 3600.0}


def work(config, ready) -> None:
    """A worker process."""
    worker = start_worker(config)
    ready.set()
    while worker.alive():
        time.sleep(0.5)


class Workers:
    """So many worker processes for one store; ended on leaving."""

    def __init__(self, config, count: int):
        context = multiprocessing.get_context("spawn")
        self.ready = [context.Event() for _ in range(count)]
        self.processes = [context.Process(target=work, args=(config, one)) for one in self.ready]

    def __enter__(self):
        for process in self.processes:
            process.start()
        for one in self.ready:
            one.wait(120)
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()


def ask(url: str, **fields) -> float:
    """Seconds of one synchronous request."""
    body = json.dumps({"prompt": PROMPT, "seed": 1, **fields}).encode()
    request = urllib.request.Request(f"{url}/v1/videos/sync", body, {"content-type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.read()[4:8] == b"ftyp"
    return time.perf_counter() - began


def bare(engine: Engine, plan: str) -> float:
    """Seconds of the same work without a server: text, steps, frames, mp4."""
    shape = engine.card.shapes[0]
    request = {"plan": plan, "seed": 1, "latent": shape.latent}
    began = time.perf_counter()
    text, x = engine.encode(PROMPT), engine.noise(request)
    for i in range(engine.card.plans[plan].num_steps):
        x, _ = engine.step(request, i, x, text)
    video.mp4(engine.decode(x), engine.card.fps)
    return time.perf_counter() - began


def throughput(server: Server, count: int, plan: str) -> float:
    """Videos per second of a queue that is full from the start."""
    store, began = server.store, time.perf_counter()
    body = json.dumps({"prompt": PROMPT, "plan": plan}).encode()
    for _ in range(count):
        request = urllib.request.Request(
            f"{server.url}/v1/videos", body, {"content-type": "application/json"}
        )
        urllib.request.urlopen(request).close()
    while (load := store.load()).queued + load.running:
        time.sleep(0.01)
    return count / (time.perf_counter() - began)


def main(requests: int, bundle: Path) -> None:
    """Print ratios."""
    engine = Engine(bundle, WorkerConfig())
    plans = [name for name in ("4", "teacher50") if name in engine.card.plans]
    with tempfile.TemporaryDirectory() as folder:
        for policy, every_s in POLICIES.items():
            place = Path(folder) / f"{every_s:g}"
            config = settings(place, bundle, worker={"checkpoint_every_s": every_s, "previews": "off"})
            server = Server(config)
            with Workers(config, 1):
                took = {("bare", plan): [] for plan in plans} | {("http", plan): [] for plan in plans}
                for _ in range(requests + 1):
                    for plan in plans:
                        took["bare", plan].append(bare(engine, plan))
                        took["http", plan].append(ask(server.url, plan=plan))
            p50 = {key: median(values[1:]) for key, values in took.items()}
            for plan in plans:
                over = p50["http", plan] / p50["bare", plan]
                added = 1000 * (p50["http", plan] - p50["bare", plan])
                print(f"HTTP over bare, p50, plan {plan}, state {policy}: {over:.2f} (+{added:.0f} ms)")
            if len(plans) == 2:
                saved = p50["http", plans[1]] / p50["http", plans[0]]
                saved_bare = p50["bare", plans[1]] / p50["bare", plans[0]]
                print(f"50 steps of the teacher over 4, by HTTP: {saved:.1f} (bare {saved_bare:.1f})")
                over = [p50["http", plan] - p50["bare", plan] for plan in plans]
                steps = [engine.card.plans[plan].num_steps for plan in plans]
                each = 1000 * (over[1] - over[0]) / (steps[1] - steps[0])
                print(f"added per step {each:.1f} ms, per video {1000 * over[0] - steps[0] * each:.0f} ms")
            server.close()
        rates = {}
        for count in (1, 2):
            config = settings(Path(folder) / f"workers{count}", bundle, worker={"previews": "off"})
            server = Server(config)
            with Workers(config, count):
                throughput(server, 4, plans[-1])
                rates[count] = throughput(server, 2 * requests, plans[-1])
            server.close()
        print(f"videos per second, 2 workers over 1, plan {plans[-1]}: {rates[2] / rates[1]:.2f}")
    print(
        f"(medians of {requests}, in turn; {engine.card.shapes[0]}; p50 in ms: "
        + ", ".join(f"{way} {plan} {1000 * value:.0f}" for (way, plan), value in p50.items())
        + ")"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        given = Path(sys.argv[2]) if len(sys.argv) > 2 else save_untrained_bundle(made, teacher_steps=[50])
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, given)
