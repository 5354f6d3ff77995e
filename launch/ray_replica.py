"""One replica under Ray Serve: the same server application as `turnout serve`, in an actor of its own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray import serve
from starlette.types import ASGIApp

from ..inference.errors import EngineStoppedError
from ..inference.server import logs
from ..inference.server.app import create_app
from ..inference.server.front import Named
from ..inference.server.service import Service
from .serve import Loader, ServeOptions, model_name


class Replica:
    """What Serve makes, asks for its health and ends.

    Args:
        path: as `load_model` has it, on the replica's machine.
        options: the engine's settings and the server's.
    """

    def __init__(self, path: str, options: ServeOptions) -> None:
        self.service = Service(options, options.served_model_name or model_name(Path(path)))
        with ThreadPoolExecutor(1, "turnout-load") as loader:  # as in a server of its own: the thread ends
            self.service.engine = loader.submit(Loader(path, options).load).result()
        self.service.phase = "ready"

    def __serve_build_asgi_app__(self) -> ASGIApp:
        logs.set_up(self.service.config.log_format)  # of this process, which is the replica's alone
        return Named(create_app(self.service), serve.get_replica_context().replica_id.unique_id)

    async def check_health(self) -> None:
        """Serve asks every second, and replaces a replica that fails here.

        Raises:
            EngineStoppedError: the engine is broken; `/health` says so too from now on.
        """
        engine = self.service.engine
        if engine is None or not engine.healthy:
            self.service.phase = "broken"
            raise EngineStoppedError("the engine is broken: the replica's log has the cause")
        self.service.history.look(engine.stats().routing)
