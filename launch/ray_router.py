"""How Ray Serve's proxy chooses a replica: one that has the prompt's beginning in its cache, else the least loaded."""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.middleware import Middleware

from ..inference.server.front import Front
from ..inference.server.prefix import PrefixTable

ENTRIES = 65536
"""Marks a proxy remembers: a few MiB."""


def middlewares() -> list[Middleware]:
    """What Serve's proxy is told to put around itself."""
    return [Middleware(Front)]


class PrefixRouter(RequestRouter):
    """A proxy's choice, by its own memory of what it has sent where.

    Ray's own prefix-aware router reads the prompt from a Python argument and asks an actor about every request; here
    the request is HTTP, and its marks come with it as the session (`inference.server.front`).
    """

    def initialize_state(self, slack: int) -> None:
        """`slack`: how many more requests than the least loaded replica one with the prefix may have."""
        self._slack = slack
        self._table: PrefixTable[ReplicaID] = PrefixTable(ENTRIES)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """These replicas are there now."""
        super().update_replicas(replicas)
        self._table.keep({replica.replica_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try: first those with the prefix, then any; of each group Serve takes the least loaded."""
        candidates = random.sample(candidate_replicas, len(candidate_replicas))  # of equals it takes the first
        if pending_request is None:
            return [candidates]
        pending_request.routing_context.should_backoff = True
        holders = self._table.holders(_marks(pending_request))
        load = {replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidates}
        most = min(load.values(), default=0) + self._slack
        near = [replica for replica in candidates if replica.replica_id in holders and load[replica.replica_id] <= most]
        return [near, candidates]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """The replica has taken the request, and has its prefix from now on."""
        self._table.remember(_marks(pending_request), replica_id)


def _marks(request: PendingRequest) -> list[str]:
    return [mark for mark in request.metadata.session_id.split(".") if mark]
