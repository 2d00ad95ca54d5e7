"""Ray Serve deployments: `serve run serve.app:app`, or `serve deploy serve/tiny.yaml`.

The ingress checks, writes and reads; sampler replicas pull jobs from the store; a janitor tidies up. They
share nothing but the job store and the artefacts: each may die, be replaced, or not be there at all.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from raydistill.config.serve import STAGES, ServeConfig, from_environment, read_args, to_args
from raydistill.errors import RaydistillError
from raydistill.service.logs import log_to

log = logging.getLogger("raydistill.service.app")
# Bounds and delays of the autoscaler, for `serve run serve.app:app`; a Serve config may say otherwise.
SCALING: dict[str, Any] = {
    "min_replicas": 0,
    "max_replicas": 2,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 30.0,
    "downscale_to_zero_delay_s": 60.0,
}
STOP_S = 50.0  # less than graceful_shutdown_timeout_s
POLICY = "raydistill.service.scaling:ByRemainingCost"


@serve.deployment(
    num_replicas=2,
    # Waiting streams and slow bodies each take one: they cost a coroutine, not a thread.
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress()
class Ingress:
    """The HTTP interface; imports no torch."""

    def __init__(self, args: dict[str, Any], *parts: object):
        """`parts` are handles of the other deployments, which are deployed with it and never called."""
        from raydistill.service import api
        from raydistill.service.catalog import Catalog

        self.config = read_args(args)
        log_to(self.config.logs, "ingress")
        catalog = Catalog.read(self.config.bundle_table(), self.config.models)
        store = from_environment(self.config.store, "store")
        self.ingress = api.Ingress.open(self.config, store, catalog)

    def __serve_build_asgi_app__(self) -> Any:
        """Make the application; Serve calls it after the constructor."""
        from raydistill.service.api import build_api

        return build_api(self.ingress)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take `bundles` and `models`, the weights between versions: from the next request on.

        What cannot be served is not taken, and said in the log: requests go where they went.
        """
        from raydistill.service.catalog import Catalog

        bundles = _absolute(user_config.get("bundles") or self.config.bundle_table())
        models = user_config.get("models", self.config.models)
        known = self.ingress.catalog
        try:
            self.ingress.catalog = await asyncio.to_thread(Catalog.verified, bundles, models, known)
        except RaydistillError:
            log.exception("the new bundles and weights are not taken")


class _Sampler:
    """A replica that works on some of the stages."""

    def __init__(self, args: dict[str, Any], stages: tuple[str, ...]):
        """Nothing is loaded yet: `reconfigure` says what."""
        from raydistill.service.files import Files
        from raydistill.service.tables import open_database
        from raydistill.service.worker import Worker, stages_of

        config = read_args(args)
        log_to(config.logs, "-".join(("sampler", *(stages if len(stages) == 1 else ()))))
        database = open_database(from_environment(config.store, "store"))
        self.config, self.files = config, Files(config.artifacts)
        self.worker = Worker(database, self.files, config.worker, config.keep, stages_of(stages))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take `bundles`: what is new is loaded, what stays is not. Serve calls it at start, too."""
        bundles = _absolute(user_config.get("bundles") or self.config.bundle_table())
        await asyncio.to_thread(self.worker.hold, bundles)
        self.worker.start()

    async def check_health(self) -> None:
        """Fail if a thread of the worker has died."""
        if not self.worker.alive():
            raise RuntimeError("a thread of this sampler has died: see its log")

    def __del__(self):
        """Finish the step in hand, save, and give the job back."""
        if hasattr(self, "worker"):
            self.worker.stop(timeout_s=STOP_S)


Sampler = serve.deployment(_Sampler, name="Sampler", ray_actor_options={"num_cpus": 0.5})
TextEncoder = serve.deployment(_Sampler, name="TextEncoder", ray_actor_options={"num_cpus": 0.2})
Denoiser = serve.deployment(_Sampler, name="Denoiser", ray_actor_options={"num_cpus": 0.5})
Decoder = serve.deployment(_Sampler, name="Decoder", ray_actor_options={"num_cpus": 0.2})
POOLS = {"encode": TextEncoder, "denoise": Denoiser, "decode": Decoder}


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Janitor:
    """Removes what expired and what nobody names; one is enough, more do no harm."""

    def __init__(self, args: dict[str, Any]):
        """Begin the rounds."""
        from raydistill.service import upkeep
        from raydistill.service.files import Files
        from raydistill.service.tables import open_database

        self.config = read_args(args)
        log_to(self.config.logs, "janitor")
        database = open_database(from_environment(self.config.store, "store"))
        files = Files(self.config.artifacts)
        self.janitor = upkeep.Janitor(database, files, self.config.keep, self.config.worker.lease_s)
        self.labels: tuple[str, ...] = ()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._rounds, daemon=True)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take `bundles`: jobs of others fail after a while. Serve calls it at start, too."""
        from raydistill.service.catalog import Catalog

        bundles = _absolute(user_config.get("bundles") or self.config.bundle_table())
        self.labels = Catalog.read(bundles, {}).labels
        if not self.thread.is_alive():
            self.thread.start()

    def _rounds(self) -> None:
        while not self.stopping.is_set():
            self.janitor.round(self.labels)
            self.stopping.wait(self.config.keep.sweep_s)

    async def check_health(self) -> None:
        """Fail if the rounds have ended."""
        if not self.thread.is_alive():
            raise RuntimeError("the janitor's thread has died: see its log")

    def __del__(self):
        """Stop after this round."""
        if hasattr(self, "stopping"):
            self.stopping.set()


def app(args: dict[str, Any]) -> Application:
    """Build the application of a Serve config's `args`: the settings of `raydistill/config/serve.py`.

    Refuses wrong settings, and bundles that are not as they were exported, before anything is deployed.
    """
    from raydistill.service.bundle import verify_bundle
    from raydistill.service.catalog import Catalog

    config = read_args(args)
    given = {**to_args(config), "bundles": _absolute(config.bundle_table())}
    given |= {name: _place(given[name]) for name in ("store", "artifacts", "logs")}
    for folder in given["bundles"].values():
        verify_bundle(folder)
    Catalog.read(given["bundles"], config.models)
    served = {"bundles": given["bundles"]}
    ingress = Ingress.options(user_config={**served, "models": given["models"]})
    janitor = Janitor.options(user_config=served)
    return ingress.bind(given, janitor.bind(given), *_samplers(config, given))


def _samplers(config: ServeConfig, args: dict[str, Any]) -> list[Application]:
    """One deployment for all stages, or one for each."""
    if config.pipeline == "monolithic":
        return [_scaled(Sampler, args, None).bind(args, STAGES)]
    return [_scaled(POOLS[stage], args, stage).bind(args, (stage,)) for stage in STAGES]


def _scaled(pool: Any, args: dict[str, Any], stage: str | None) -> Any:
    policy = {"policy_function": POLICY, "policy_kwargs": {"store": args["store"], "stage": stage}}
    return pool.options(
        autoscaling_config={**SCALING, "policy": policy},
        graceful_shutdown_timeout_s=60.0,
        user_config={"bundles": args["bundles"]},
    )


def _absolute(bundles: Mapping[str, str]) -> dict[str, str]:
    return {name: str(Path(folder).absolute()) for name, folder in bundles.items()}


def _place(value: str) -> str:
    """Make a local path absolute, where this process stands: replicas stand elsewhere."""
    prefix = "sqlite:///"
    if value.startswith(prefix):
        return prefix + str(Path(value.removeprefix(prefix)).absolute())
    local = value and "://" not in value and not value.startswith("env:")
    return str(Path(value).absolute()) if local else value
