"""Serve a model over HTTP: `turnout serve runs/x port=8000`."""

import asyncio
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inference.config import EngineConfig
from ..inference.errors import EngineStoppedError
from ..inference.server.config import ServerConfig
from ..inference.stages import Stages
from . import main as cli
from . import ranks
from .cli import Options, parse, write_json
from .narrator import Narrator
from .ranks import Several

if TYPE_CHECKING:
    from ..inference.async_engine import AsyncEngine
    from ..inference.ranks import Ranks

SUMMARY = "serve a model over an OpenAI-compatible HTTP API"
HELP = """\
Serve a run, a model directory or a GGUF file over an OpenAI-compatible HTTP API.

usage: turnout serve CKPT [key=value ...]

  port=8000                    0 takes any free port; the line `ready: URL` tells which
  host=127.0.0.1               anything but loopback needs api_key
  api_key=KEY                  clients send it as `Authorization: Bearer KEY`
  served_model_name=NAME       the model's name in requests; by default its directory's or file's
  allowed_hosts=NAME,...       what `Host` may say beside the bound address
  compat=strict                lenient: unknown fields of a request are left out, and named in `Warning`
  drain_seconds=30             how long running requests may still take after SIGTERM
  max_num_seqs=64              requests that run at once
  max_num_batched_tokens=512   tokens in one step
  max_model_len=N              longest prompt + completion
  kv_memory_mb=N               size of the KV cache
  kv_dtype=auto                int8: a byte a number, and a scale a head and token
  watchdog_seconds=120         a step that takes longer ends the server: its stacks go to stderr
  moe_capacity=dropless        trained: experts drop what they drop in the trainer's evaluation
  semi_structured=false        true: a GPU leaves out the zeros of matrices pruned 2:4
  dtype=auto                   float32, bfloat16, ...
  nproc=1                      processes that compute together, each on a GPU of its own if there are as many
  parallel.ep=2                ranks over which the experts are spread
  parallel.tp=2                ranks that divide heads and hidden units; what is left of nproc are replicas
  kernels=auto                 reference, triton or cpp: this form of every operation that has it
  deterministic=false          true: a request's bits do not depend on what runs beside it; on a CPU only
  log_format=text              json: every line that is written is an object
  otlp_endpoint=URL            send a trace of each request there, by OTLP over HTTP (pip install 'turnout[otel]')
  json=PATH                    write the URL and the load times there once it is ready

endpoints: /v1/completions /v1/chat/completions /v1/embeddings (refused: a language model has none) /v1/models
           /v1/experts /tokenize /detokenize /load /health /ready /metrics /version /openapi.json
console:   / in a browser: try the model, and watch its steps, KV cache and experts

example: turnout serve runs/first port=8000
         curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
              -d '{"model": "first", "prompt": "The list", "max_tokens": 32}'
"""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options, Several, EngineConfig, ServerConfig):
    """What `turnout serve` takes: the engine's settings and the server's."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        ServerConfig.__post_init__(self)
        Several.__post_init__(self)


def main(args: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean end."""
    (path,), options = parse(ServeOptions, args, words=["ckpt"])
    if ranks.is_rank():
        return ranks.play(lambda: serve(path, options), lambda: ranks.follow(path, options, options))
    if options.nproc > 1:
        return ranks.run(f"{__package__}.serve", args, options.nproc, options.parallel.timeout)
    return serve(path, options)


def serve(path: str, options: ServeOptions) -> int:
    """Serve from this process, which may be rank 0 of several."""
    from ..inference.server import logs
    from ..inference.server.lifecycle import Server, bind

    logs.set_up(options.log_format)
    narrator = Narrator(options.log_format)
    name = options.served_model_name or model_name(Path(path))
    listener, url = bind(options)
    loader = Loader(path, options)
    server = Server(options, name, loader.load)

    def announce() -> None:
        result = {"url": url, "model": name, "pid": os.getpid(), "load_seconds": loader.seconds, "memory": loader.plan}
        write_json(options.json, result)
        times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in loader.seconds.items())
        narrator.tell("loaded", f"loaded {name} ({times})", model=name, seconds=loader.seconds)
        narrator.tell("memory", loader.memory, memory=loader.plan)
        narrator.tell("ready", f"ready: {url} (in a browser: the console)", url=url)

    with server.signals():
        narrator.tell("loading", f"loading {path} (until it is ready, {url}/health answers 503)", url=url)
        try:
            asyncio.run(server.run(listener, announce))
        except EngineStoppedError as error:
            if loader.ranks is not None:
                loader.ranks.check()
            narrator.fail(str(error))
            os._exit(1)  # a thread that is stuck in a step is not waited for
        if loader.ranks is not None:
            loader.ranks.end()
        narrator.tell("stopped", "stopped")
    return 0


def model_name(path: Path) -> str:
    """What a checkpoint is called in requests: its directory's name, a run's for `runs/x/model`, a GGUF file's or
    package's without `.gguf` or `package:`."""
    path = path.resolve()
    name = path.parent.name if path.name == "model" else path.name
    return name.removesuffix(".gguf").removeprefix("package:")


class Loader:
    """Loads the engine and remembers what took how long.

    Args:
        path: as `load_model` has it.
        options: the engine's settings.

    Attributes:
        ranks: those that compute together, if there are several.
        seconds: what → how long it took.
        memory: the plan of the memory in words.
        plan: the same in numbers.
    """

    def __init__(self, path: str, options: ServeOptions) -> None:
        self.ranks: Ranks | None = None
        self.seconds: dict[str, float] = {}
        self.memory = ""
        self.plan: dict[str, Any] = {}
        self._path = path
        self._options = options

    def load(self) -> "AsyncEngine":
        """The started engine; this is where torch is first imported."""
        stages = Stages()
        from ..inference.async_engine import AsyncEngine
        from ..inference.engine import Engine
        from ..inference.ranks import Ranks

        stages.done("import")
        self.ranks = Ranks.join(self._options.parallel, self._options)
        if self.ranks is not None:
            stages.done("ranks")
        engine = Engine.from_path(self._path, self._options, ranks=self.ranks, stages=stages)
        engine.warm_up()
        stages.done("warm-up")
        self.seconds = stages.seconds
        self.memory, self.plan = str(engine.memory_plan), engine.memory_plan.to_dict()
        started = AsyncEngine(engine)
        started.start()
        gc.freeze()  # what is there now stays: collections need not look through it
        return started


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
