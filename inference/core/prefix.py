"""The prefix cache: which blocks hold which computed prefix, and which of them nobody uses just now.

A block's name is a sha256 chain: the hash of its parent and its own tokens, from a root made of the model's fingerprint
and the request's salt and encoder input. So a name stands for a whole prefix under one set of weights, and can not
collide by chance.
"""

import hashlib
from array import array
from collections import OrderedDict

from .request import Request


class PrefixCache:
    """Names of computed blocks, and the least recently used order of those without a reference.

    Args:
        fingerprint: whatever decides the values in the cache: model version, KV precision.
    """

    def __init__(self, fingerprint: bytes) -> None:
        self._root = hashlib.sha256(fingerprint).digest()
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Published blocks without a reference, the next to be evicted first."""

    def insert(self, name: bytes, block: int) -> None:
        """Publish a computed block that is in use."""
        self.block_of[name] = block
        self.hash_of[block] = name

    def evict(self) -> int:
        """Forget the least recently used idle block and hand it out."""
        block, _ = self.idle.popitem(last=False)
        del self.block_of[self.hash_of.pop(block)]
        return block

    def hashes(self, request: Request, count: int, block_size: int) -> list[bytes]:
        """The names of the request's first `count` blocks, all full of known tokens; kept in the request."""
        names = request.block_hashes
        for i in range(len(names), count):
            parent = names[-1] if names else self.root(request)
            tokens = array("q", request.token_ids[i * block_size : (i + 1) * block_size])
            names.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return names[:count]

    def root(self, request: Request) -> bytes:
        """The name of the empty prefix under the request's salt and encoder input; kept in the request."""
        if not request.root:
            request.root = self._root_of(request.cache_salt)
            if request.encoder_token_ids is not None:
                tokens = array("q", request.encoder_token_ids)
                request.root = hashlib.sha256(b"encoder" + request.root + tokens.tobytes()).digest()
        return request.root

    def _root_of(self, salt: str) -> bytes:
        return hashlib.sha256(self._root + salt.encode("utf-8", "surrogatepass")).digest()
