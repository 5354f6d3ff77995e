"""Serve a model with several replicas under Ray Serve: `python -m turnout.launch.ray_serve runs/x replicas=2`."""

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import ConfigError, PeerError
from ..configs.typed import check
from ..inference.server.lifecycle import SIGNALS, bind
from . import main as cli
from .cli import parse, write_json
from .serve import ServeOptions

if TYPE_CHECKING:
    from ray.serve import Application

HELP = """\
Serve a model with several replicas behind one port, under Ray Serve (pip install 'turnout[ray]').

usage: python -m turnout.launch.ray_serve CKPT [key=value ...]

  replicas=2                   engines, each in a process of its own
  max_replicas=8               more of them while there is more to do, and back to `replicas` afterwards
  target_ongoing_requests=N    requests a replica should have; by default max_num_seqs
  replica_cpus=1               cores of a replica (and threads of its kernels)
  replica_gpus=0               GPUs of a replica
  ray_address=HOST:PORT        of a running cluster; by default one is started here, and ended with us
  ...                          and all of `turnout serve`, except nproc

CKPT is read by every replica, on its own machine.
"""
APP = "turnout"
ROUTER = "turnout.launch.ray_router.middlewares"
OBJECT_STORE_BYTES = 128 * 1024 * 1024  # requests and answers pass through it only while they are small
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ROUTER,
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "x-turnout-prefix",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # lines of requests look alike
}
QUIET: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}
HEALTH_SECONDS = 1.0  # between two looks at a replica's health
STARTS = 2  # tries of the first replicas
LAST_WORDS_SECONDS = 1.0  # what a replica gets beyond drain_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions(ServeOptions):
    """What `turnout serve` takes, and how many of it.

    Args:
        replicas: how many engines there are, or at least are.
        max_replicas: how many there may be; None = `replicas`.
        target_ongoing_requests: how many requests each should have when their number changes; None = `max_num_seqs`.
        replica_cpus, replica_gpus: what each is given.
        ray_address: the cluster's; None starts one on this machine.

    Raises:
        ConfigError: a value out of range, or several ranks a replica.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_ongoing_requests: float | None = None
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.replicas >= 1, "replicas", self.replicas, "must be at least 1", "use 1 or more")
        check(
            self.max_replicas is None or self.max_replicas >= self.replicas,
            "max_replicas",
            self.max_replicas,
            f"must be at least replicas ({self.replicas})",
            "raise it or leave it out",
        )
        check(
            self.target_ongoing_requests is None or 0 < self.target_ongoing_requests < math.inf,
            "target_ongoing_requests",
            self.target_ongoing_requests,
            "must be a positive number of requests",
            "use max_num_seqs or less",
        )
        for name in ("replica_cpus", "replica_gpus"):
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "must be a number from 0", "use 1")
        check(
            self.nproc == 1, "nproc", self.nproc, "must be 1 under Ray Serve: a replica is one process", "use replicas"
        )


def main(args: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean end. A second signal does not wait for requests in flight."""
    if "-h" in args or "--help" in args:
        print(HELP.strip())
        return 0
    (path,), options = parse(RayOptions, args, words=["ckpt"])
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("several replicas need Ray Serve, which is not installed: pip install 'turnout[ray]'")
    listener, url = bind(options)
    options = dataclasses.replace(options, port=listener.getsockname()[1])
    listener.close()  # it was free
    with _cluster(options), _Signals() as signals:
        print(f"starting {options.replicas} x {path} (until they are ready, {url}/health answers 503)", flush=True)
        with _running(path, options):
            write_json(options.json, {"url": url, "replicas": options.replicas, "pid": os.getpid()})
            print(f"ready: {url}", flush=True)
            signals.wait()
    print("stopped", flush=True)
    return 0


def application(path: str, options: RayOptions) -> "Application":
    """What Serve runs: replicas of the server, found by prefix or by load.

    Serve asks a replica it ends to finish what it has for `drain_seconds`; streams that take longer end with an error.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from .ray_replica import Replica
    from .ray_router import PrefixRouter

    number: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        target = options.target_ongoing_requests or options.max_num_seqs
        scale = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        number = {"autoscaling_config": scale | {"target_ongoing_requests": target}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="server",
        max_ongoing_requests=options.max_num_seqs + options.max_waiting,  # beyond them the engine itself refuses
        max_queued_requests=options.max_waiting,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=options.drain_seconds + LAST_WORDS_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=STARTS,
        logging_config=QUIET,
        ray_actor_options={"num_cpus": options.replica_cpus, "num_gpus": options.replica_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": max(1, options.max_num_seqs // 4)}
        ),
        **number,
    )
    return deployment.bind(path, options)


@contextlib.contextmanager
def _running(path: str, options: RayOptions) -> Iterator[None]:
    """The replicas are there and ready; afterwards they finish what they have, and end."""
    from ray import serve

    try:
        serve.run(application(path, options), name=APP, route_prefix="/")
        yield
    except RuntimeError as error:
        raise PeerError(f"no replica of {path} could be started: {_cause() or error}") from error
    finally:
        if not isinstance(sys.exception(), SystemExit):
            serve.delete(APP)


def _cause() -> str:
    """The error that ended a replica: the last line of its traceback, which Serve has kept."""
    from ray import serve

    application = serve.status().applications[APP]
    told = [line for deployment in application.deployments.values() for line in deployment.message.splitlines()]
    return next((line for line in reversed(told) if re.match(r"[\w.]+: ", line)), "")


@contextlib.contextmanager
def _cluster(options: RayOptions) -> Iterator[None]:
    """Ray and Serve's proxies run while this lasts; a cluster that was there before stays."""
    os.environ.update(ENVIRONMENT)  # for the processes that Ray starts
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(QUIET["log_level"])
    own = options.ray_address is None
    most = options.max_replicas or options.replicas
    resources = {
        "num_cpus": max(os.cpu_count() or 1, math.ceil(most * options.replica_cpus)),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",  # nobody else joins
    }
    ray.init(options.ray_address or "local", logging_level="warning", **(resources if own else {}))
    try:
        serve.start(
            proxy_location="HeadOnly" if own else "EveryNode",
            http_options={"host": options.host, "port": options.port},
            controller_options={"runtime_env": {"env_vars": ENVIRONMENT}},
            logging_config=QUIET,
        )
        yield
    finally:
        ray.shutdown()


class _Signals:
    """SIGTERM and SIGINT: the first ends the waiting, or the process while it does not wait yet; so does a second."""

    def __init__(self) -> None:
        self._waiting = False
        self._stopped = threading.Event()

    def __enter__(self) -> "_Signals":
        for number in SIGNALS:
            signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def wait(self) -> None:
        """Return at the first signal."""
        self._waiting = True
        self._stopped.wait()

    def _take(self, number: int, frame: object) -> None:
        if self._waiting and not self._stopped.is_set():
            self._stopped.set()
        else:
            raise SystemExit(128 + number if self._waiting else 0)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
